"""Without a TRL of the tested versions these are skipped: pip install 'trl>=1.15,<1.17'."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.version import Version


def _lacks() -> str:
    """What is missing, or nothing."""
    if importlib.util.find_spec("trl") is None:
        return "needs TRL: make test-trl"
    found = importlib.metadata.version("trl")
    if not (1, 15) <= Version(found).release[:2] <= (1, 16):
        return f"needs TRL 1.15 or 1.16, not {found}: make test-trl"
    return ""


class _Skipped(pytest.Module):
    """A file that is not imported: it would import TRL."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip(_lacks(), allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return _Skipped.from_parent(parent, path=module_path) if _lacks() else None


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Qwen3-VL, with weights that make it look at its image."""
    from trl_stack import small

    return small.model(tmp_path_factory.mktemp("small"))
