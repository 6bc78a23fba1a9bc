"""verl's environment for a CPU; without verl these tests are skipped (docs/VERL.md)."""

import importlib.util
import os
from functools import lru_cache

import pytest
import torch

# verl alone may be there for its head, without what its engine needs (make bench).
NEEDED = ("verl", "ray", "tensordict", "transfer_queue")
FOUND = all(importlib.util.find_spec(name) is not None for name in NEEDED)
# Before verl is imported: it looks then.
if FOUND:
    os.environ |= {
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_ENGINE_VENDOR": "roma",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu,roma.integrations.verl.plugin",
        "ROMA_OPTIONS": "num_views=2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if "verl_stack" in item.path.parts]
    if not FOUND:
        for item in own:
            item.add_marker(pytest.mark.skip(reason="needs verl: make test-verl"))


@lru_cache(maxsize=8)
def _worker(name: str):
    from verl_stack import cases

    made = {
        "plain": {},
        "packed": {"remove_padding": True},
        "lora": {"lora": 4},
        "checkpointing": {"checkpointing": True},
    }
    return cases.worker(**made[name])


@pytest.fixture(scope="session")
def worker_of():
    """verl's TrainingWorker with `RomaEngine`, of a kind and with options; built once a kind."""
    from roma.integrations.options import RomaOptions

    def get(kind: str = "plain", options: RomaOptions | None = None):
        worker = _worker(kind)
        worker.engine._prepare(RomaOptions() if options is None else options)
        return worker

    return get
