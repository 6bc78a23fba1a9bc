"""Runs of the sibling methods, on one process or on two ranks of which the first has text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engine_run import Fixed, as_questions
from support.small_run import config
from support.worked_answers import TAGS, Worked

from roma.train.trainer import Trainer

MSSR = ("algorithm.adv_estimator=mssr", "worker.rollout.n=1")
METHODS = {
    "mssr and srpo": (
        *MSSR,
        *("algorithm.reweight=srpo", *TAGS, "trainer.total_steps=2"),
        *("data.rollout_batch_size=8", "worker.actor.mini_batch_size=4"),
    ),
    "vgpo": ("algorithm.reweight=vgpo", "worker.actor.micro_batch_tokens=80"),
    "noisy_rollout": ("algorithm.view_mode=noisy_rollout",),
}
COMPARED = ("advantage", "reward", "actor", "views")

Found = tuple[list[dict[str, float]], dict[str, Any]]  # metrics of each step, and what is kept


def run(folder: Path, name: str, *more: str) -> Found:
    """A step or two of a method."""
    options = ("trainer.total_steps=1", *METHODS[name], *more)
    trainer = Trainer(config(folder / name.replace(" ", "_"), *options))
    as_questions(trainer)
    trainer.collector.sampler = Worked(trainer.policy) if "srpo" in name else Fixed(0)
    found: list[dict[str, float]] = []
    trainer.fit(lambda _, metrics: found.append(dict(metrics)))
    return found, trainer.collector.advantages.state_dict()


def check(mine: Found, one: Found, *, rank: int) -> None:
    """Metrics of two ranks are those of one process up to rounding, tracked values to the bit."""
    pairs = zip(mine[0], one[0], strict=True) if rank == 0 else ()
    for found, want in pairs:
        for name, value in want.items():
            if name.split("/")[0] in COMPARED:
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert mine[1].keys() == one[1].keys()
    for kept, expected in zip(mine[1].values(), one[1].values(), strict=True):
        assert kept.pop("kl") == pytest.approx(expected.pop("kl"), rel=1e-3, abs=1e-6)
        assert kept == expected and kept["prompts"]
