"""One tiny model and its seven tasks serve all tests; without lmms-eval there are none."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# They import it where they stand: without it there is nothing to collect. make test-lmms
if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, no cache of the user's, and a key that MathVista asks for at import."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["OPENAI_API_KEY"] = "none"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # vLLM's reads what it has not set
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and tasks/."""
    from lmms_stack.suite import write_suite

    return write_suite(tmp_path_factory.mktemp("suite"))
