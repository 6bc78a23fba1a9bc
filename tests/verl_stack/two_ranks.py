"""What each of two ranks runs: its half of the rows, once for gradients and once in verl's loop."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from support import ranks
from verl_stack import cases

LIMIT = 120.0  # seconds that a rank waits for the other


def half(rank: int, store: Path, halves: list[list[int]], options: str) -> None:
    """Writes `store`.<rank>: whole gradients, and what verl's loop reports."""
    os.environ["ROMA_OPTIONS"] = options
    ranks.join(rank, store, LIMIT)
    given = torch.load(store.with_suffix(".rows"), weights_only=False)
    worker = cases.worker(micro_batch_size_per_gpu=len(halves[rank]))
    own = [given[i] for i in halves[rank]]
    output, gradients = cases.step(worker, cases.batch(own, total=len(given)))
    worker.set_loss_fn(cases.loss_of(cases.actor()))
    data = cases.batch(own, total=len(given), mini_batch_size=len(given))
    metrics = worker.train_mini_batch(data)["metrics"]
    said = {"gradients": gradients, "loss": output["loss"], "metrics": metrics}
    torch.save(said, store.with_suffix(f".{rank}"))
    ranks.leave()
