"""A batch cut into the calls of an update or of a scoring pass, as many on every rank.

A call of a sharded model is a collective: a rank with fewer prompts, or shorter ones, would leave
the others waiting. It runs its first prompt once more, where nothing comes of it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from roma.train import ranks
from roma.train.batch import UpdateBatch, micro_batches


def to_learn(
    batch: UpdateBatch, sizes: Sequence[int], limit: int
) -> list[tuple[Tensor, UpdateBatch]]:
    """Micro-batches of at most `limit` tokens, of the prompts of which something is run.

    Args:
        batch: P prompts.
        sizes: tokens of the text model by prompt; 0: nothing of it is run.
        limit: tokens; a larger prompt stands alone.

    Returns:
        The numbers of a micro-batch's rollouts [b] int64 in `batch`, and the micro-batch. One that
        another rank makes necessary has no numbers, and rollouts that are worth nothing.
    """
    run = [prompt for prompt, size in enumerate(sizes) if size] or [0]
    rows = torch.arange(len(batch.group), device=batch.group.device).view(len(sizes), -1)
    parts = []
    for part in micro_batches([sizes[prompt] for prompt in run], limit):
        own = [run[i] for i in part]
        parts.append((rows[own].flatten(), batch.select(own)))
    first = batch.select([0])
    idle = replace(
        first,
        advantages=torch.zeros_like(first.advantages),
        correct=torch.zeros_like(first.correct),
    )
    missing = ranks.most(len(parts)) - len(parts)
    return parts + [(rows[:0].flatten(), idle)] * missing


def to_score(
    batch: UpdateBatch, sizes: Sequence[int], limit: int | None
) -> tuple[list[UpdateBatch], int]:
    """All of a batch by calls of at most `limit` tokens, prompt after prompt.

    Returns:
        The parts, and how many of them have a result: those behind are another rank's need.
    """
    parts, start, held = [], 0, 0
    for prompt, size in enumerate(sizes):
        if limit is not None and held and held + size > limit:
            parts.append(batch.select(range(start, prompt)))
            start, held = prompt, 0
        held += size
    parts.append(batch.select(range(start, len(sizes))))
    missing = ranks.most(len(parts)) - len(parts)
    return parts + [batch.select([0])] * missing, len(parts)
