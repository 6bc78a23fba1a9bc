"""What the tests of a card share.

    PYTHONPATH=.:kernels python -m pytest tests/gpu -m gpu

A test that takes `device` has two forms: on a card, and small, on the CPU with Triton's kernels
interpreted, so that its own code is known to run before a card is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from roma_kernels.linear_logprob.triton.tuning import override

CARD = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gluon has no interpreter: no test of it on the CPU."""
    impossible = {"plan": "gluon", "device": "cpu"}

    def drawn(item: pytest.Item) -> dict[str, object]:
        return item.callspec.params if hasattr(item, "callspec") else {}

    items[:] = [item for item in items if not impossible.items() <= drawn(item).items()]


@pytest.fixture(params=[CARD, "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """A card, or the CPU that stands in for one."""
    return request.param


@pytest.fixture(params=["triton", "vendor", pytest.param("gluon", marks=pytest.mark.gpu)])
def plan(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the Triton back end forms logits; gluon has no interpreter."""
    with override(f"plan={request.param}"):
        yield request.param


@pytest.fixture(autouse=True)
def returned() -> Iterator[None]:
    """What a test has freed is free for other processes on the card, too."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def as_users() -> Iterator[None]:
    """Torch's own settings: the other tests ask for deterministic algorithms and filled memory."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
