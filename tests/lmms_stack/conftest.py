"""Without lmms-eval the tests are skipped; one tiny model and its seven tasks serve all of them."""

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        skip = pytest.mark.skip(reason="needs lmms-eval: make test-lmms")
        for item in items:
            if "lmms_stack" in item.path.parts:
                item.add_marker(skip)


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
