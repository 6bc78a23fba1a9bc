"""A batch cut into the calls of an update or of a scoring pass, as many on every rank.

A call of a sharded model is a collective: a rank with fewer prompts, or shorter ones, would leave
the others waiting. It runs its first prompt once more, where nothing comes of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from roma.train import ranks
from roma.train.batch import UpdateBatch, micro_batches


class Parts:
    """Micro-batches, each made when its turn comes: the pixels of all would be held twice.

    Args:
        batch: P prompts.
        prompts: of each micro-batch; one without any is there for another rank's sake.
    """

    def __init__(self, batch: UpdateBatch, prompts: Sequence[Sequence[int]]) -> None:
        """Nothing is cut yet."""
        self._batch, self._prompts = batch, prompts

    def __len__(self) -> int:
        """How many there are."""
        return len(self._prompts)

    def __iter__(self) -> Iterator[tuple[Tensor, UpdateBatch]]:
        """The numbers of a micro-batch's rollouts [b] int64 in the batch, and the micro-batch.

        One without prompts is the first prompt, its rollouts worth nothing, and no numbers.
        """
        group = self._batch.group
        rows = torch.arange(len(group), device=group.device)
        rows = rows.view(len(self._batch.prompts.images), -1)
        for own in self._prompts:
            yield rows[list(own)].flatten(), self._batch.select(own) if own else self._idle()

    def _idle(self) -> UpdateBatch:
        first = self._batch.select([0])
        return replace(
            first,
            advantages=torch.zeros_like(first.advantages),
            correct=torch.zeros_like(first.correct),
            idle=True,
        )


def to_learn(batch: UpdateBatch, sizes: Sequence[int], limit: int) -> Parts:
    """Micro-batches of at most `limit` tokens, of the prompts of which something is run.

    Args:
        batch: P prompts.
        sizes: tokens of the text model by prompt; 0: nothing of it is run.
        limit: tokens; a larger prompt stands alone.

    Returns:
        As many micro-batches as the rank with the most has, one at least.
    """
    run = [prompt for prompt, size in enumerate(sizes) if size]
    parts = micro_batches([sizes[prompt] for prompt in run], limit) if run else []
    chosen = [[run[i] for i in part] for part in parts]
    missing = max(ranks.most(len(chosen)), 1) - len(chosen)
    return Parts(batch, chosen + [[]] * missing)


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
