"""Runs of the trainer whose rollouts depend on prompt and step alone, on one rank or several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support import small_model
from support.small_run import config

from roma.data import Example, load_dataset_rows
from roma.models.prompts import PromptBatch
from roma.rollout.base import Rollouts
from roma.train.config import Config
from roma.train.trainer import Trainer


class Fixed:
    """Completions of up to six tokens by what a prompt says, and how often it was asked."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def sample(
        self, prompts: PromptBatch, *, group_size: int, max_new_tokens: int, **_: Any
    ) -> Rollouts:
        """As `Sampler` has it, but of no policy."""
        self.calls += 1
        rows, lengths = [], []
        for ids, own in zip(prompts.input_ids, prompts.lengths, strict=True):
            seed = hash((self.calls, *ids[-own:].tolist())) % 2**31
            generator = torch.Generator().manual_seed(seed)
            size = (group_size, max_new_tokens)
            rows.append(torch.randint(9, 20, size, generator=generator))
            lengths.append(torch.randint(1, max_new_tokens + 1, size[:1], generator=generator))
        tokens = torch.cat(rows)
        mask = torch.arange(max_new_tokens) < torch.cat(lengths)[:, None]
        return Rollouts(tokens, mask, mask.sum(-1) < max_new_tokens)


def questions() -> list[Example]:
    """Twenty; of four in turn the first two have no image, so that the first rank has none."""
    rows = load_dataset_rows(small_model.folder() / "data", split="train")
    made = []
    for number, example in enumerate(rows[:20]):
        problem = f"larger {'sum ' * (number + 1)}?"
        alone = replace(example, images=(), problem=problem)
        made.append(alone if number % 4 < 2 else example)
    return made


def run_config(out: Path, *overrides: str) -> Config:
    """Five steps of four prompts × four rollouts."""
    return config(
        out,
        "trainer.total_steps=5",
        "worker.actor.micro_batch_tokens=150",
        "worker.actor.lr=1e-4",
        *overrides,
    )


def as_questions(trainer: Trainer) -> None:
    """Gives a trainer these, in their order, to train on and to validate with."""
    trainer.data = trainer.val_data = questions()  # type: ignore[assignment]  # a sequence, too
    trainer.data_size = len(trainer.data)
    trainer._order = lambda _: torch.arange(trainer.data_size)  # type: ignore[method-assign]


def trainer_of(chosen: Config) -> Trainer:
    """A trainer of these questions, with such rollouts."""
    trainer = Trainer(chosen)
    as_questions(trainer)
    trainer.collector.sampler = Fixed(trainer.step)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All of them, whole."""
    return {name: w.detach().cpu().clone() for name, w in trainer.engine.weights()}
