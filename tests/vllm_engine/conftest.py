"""One engine for all tests; without vLLM they are skipped (docs/ROLLOUTS.md has the set-up)."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="needs vLLM: make test-vllm")
        for item in items:
            if "vllm_engine" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def settings() -> Iterator[None]:
    """vLLM on a CPU: a small cache; and memory of its own that it does not write holds no NaN.

    It multiplies what it has not written by a weight of zero.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def engine():
    """A source, and a sampler of it."""
    from vllm_engine.model import Source

    source = Source()
    source.change(1)  # the weights are not the folder's: they have to be taken
    return source, source.sampler()
