"""Weights, gradients and optimizer of each engine: the estimate within 15 % of what two ranks hold.

DeepSpeed's are checked where it is installed: make test-deepspeed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.measured import hold_states_to_measured
from support.ranks import Ranks

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not DEEPSPEED, reason="needs DeepSpeed: make test-deepspeed")


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes."""
    started = Ranks()
    yield started
    started.stop()


@pytest.mark.parametrize("frozen", [False, True])
def test_one_process(tmp_path: Path, frozen: bool) -> None:
    hold_states_to_measured(0, str(tmp_path), "single", False, frozen, ranks=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "several", "frozen"),
    [
        ("ddp", False, False),
        ("ddp", True, True),
        ("fsdp2", False, False),
        ("fsdp2", True, False),
        ("fsdp2", True, True),
        *(
            pytest.param(f"zero{stage}", several, several, marks=ZERO)
            for stage in (1, 2, 3)
            for several in (False, True)
        ),
    ],
)
def test_two_ranks(two: Ranks, tmp_path: Path, engine: str, several: bool, frozen: bool) -> None:
    two.run(hold_states_to_measured, str(tmp_path), engine, several, frozen)
