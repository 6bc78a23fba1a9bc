"""What the update learns from, cut into mini-batches and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from roma.models.qwen_vl import PromptBatch
from roma.rollout.base import Rollouts


class Totals(NamedTuple):
    """Counts that normalise the loss: of a whole mini-batch, over its micro-batches and ranks."""

    sequences: int
    tokens: int
    correct: int


@dataclass(frozen=True)
class UpdateBatch:
    """P prompts, each with G rollouts and K views, and what the loss needs to know of them.

    Rollouts are in the order of their prompts.
    """

    prompts: PromptBatch
    view_pixels: list[Tensor]  # K views of the prompts' images, each [Σ gh·gw, C]
    group: Tensor  # [B] int64: the prompt of each rollout, counted within this batch
    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B] or [B, T]
    correct: Tensor  # [B] bool
    aux_view: Tensor | None  # [B] int64
    old_logp: Tensor | None  # [B, T]; None: the policy as it is now sampled the tokens

    @classmethod
    def to_score(cls, prompts: PromptBatch, rollouts: Rollouts, group: Tensor) -> "UpdateBatch":
        """Rollouts to be scored, not learnt from: no views, and advantages of 0."""
        return cls(
            prompts=prompts,
            view_pixels=[],
            group=group,
            tokens=rollouts.tokens,
            mask=rollouts.mask,
            advantages=torch.zeros(group.shape, device=group.device),
            correct=torch.zeros_like(group, dtype=torch.bool),
            aux_view=None,
            old_logp=None,
        )

    def without_views(self) -> "UpdateBatch":
        """The same with K = 0."""
        return replace(self, view_pixels=[], aux_view=None)

    def totals(self) -> Totals:
        """The counts of this batch."""
        return Totals(len(self.mask), int(self.mask.sum()), int(self.correct.sum()))

    def split(self, size: int) -> Iterator["UpdateBatch"]:
        """Batches of `size` prompts each, the last one perhaps smaller."""
        prompts = len(self.prompts.images)
        for start in range(0, prompts, size):
            yield self._select(slice(start, min(start + size, prompts)))

    def _select(self, prompts: slice) -> "UpdateBatch":
        group_size = len(self.group) // len(self.prompts.images)
        rows = slice(prompts.start * group_size, prompts.stop * group_size)
        patches = self.prompts.patches(prompts)
        return replace(
            self,
            prompts=self.prompts.select(prompts),
            view_pixels=[pixels[patches] for pixels in self.view_pixels],
            group=self.group[rows] - prompts.start,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            advantages=self.advantages[rows],
            correct=self.correct[rows],
            aux_view=None if self.aux_view is None else self.aux_view[rows],
            old_logp=None if self.old_logp is None else self.old_logp[rows],
        )
