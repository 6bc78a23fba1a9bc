"""A step of the trainer, and each engine's weights, gradients and optimizer, as estimated: 15 %.

DeepSpeed's are checked where it is installed: make test-deepspeed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import measured, small_run
from support.measured import hold_states_to_measured
from support.ranks import Ranks

from bench.update_step.count import counted
from roma.train.estimate import Assumed, estimate
from roma.train.trainer import Trainer

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_the_trainer(tmp_path: Path, dtype: str) -> None:
    """From the configuration alone: what its update, of all rollouts on all images, holds."""
    config = small_run.config(
        tmp_path,
        "worker.actor.update=joint",
        "trainer.device=cpu",
        f"trainer.dtype={dtype}",
    )
    parts = {part.name: part.size for part in estimate(config, Assumed(tflops=1, ranks=1)).parts}
    trainer = Trainer(config)
    # No answer ends before it is as long as it may be, and no two are equal.
    trainer.policy.model.generation_config.eos_token_id = 10**6
    trainer.step = 1
    experience, _ = trainer.collector.collect(trainer.draw(), 1)
    every = experience.rollouts.tokens
    words = len(trainer.policy.head_weight) - 8  # the ids from 8 on
    every.copy_(8 + torch.arange(every.numel()).view_as(every) % words)
    assert experience.rollouts.mask.all()
    weights = list(trainer.policy.parameters())
    found = counted(
        lambda: trainer.learner.update(experience, experience.views.result(), 1), weights
    )
    said = parts["activations"] + parts["weights in bfloat16"]
    assert found.saved == pytest.approx(said, rel=0.15)
    moments = [list(state.values()) for state in trainer.engine.optimizer.state.values()]
    assert measured.size(weights) == parts["weights"]
    assert measured.size(x for state in moments for x in state) == pytest.approx(
        parts["optimizer"], rel=0.01
    )


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
