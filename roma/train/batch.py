"""What the update learns from, cut into mini-batches and micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roma.models.prompts import ImageFeatures, PromptBatch
from roma.rollout.base import Rollouts


class Totals(NamedTuple):
    """Counts that normalise the loss: of a whole mini-batch, over its micro-batches and ranks."""

    sequences: int
    tokens: int
    correct: int  # rollouts under the penalty, as `UpdateBatch.correct`

    def arguments(self) -> dict[str, int]:
        """As `roma.roma_loss` takes them."""
        return {f"total_{name}": count for name, count in self._asdict().items()}


@dataclass(frozen=True)
class UpdateBatch:
    """P prompts, each with G rollouts and K views, and what the loss needs to know of them.

    Rollouts are in the order of their prompts.
    """

    prompts: PromptBatch
    view_pixels: list[Tensor]  # K views of the prompts' images, each [Σ gh·gw, C]
    group: Tensor  # [B] int64: the prompt of each rollout, counted within this batch
    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool, from the left
    advantages: Tensor  # [B] or [B, T]
    correct: Tensor  # [B] bool, as the loss calls them: rollouts under its penalty
    aux_view: Tensor | None  # [B] int64
    old_logp: Tensor | None  # [B, T]; None: the policy as it is now sampled the tokens
    clean_features: ImageFeatures | None = None  # of the clean images, as they were sampled on
    ref_logp: Tensor | None = None  # [B, T] of a reference policy, where the loss has a KL to it
    rollout_weight: Tensor | None = None  # [B, T] ≥ 0, of the sampler's correction
    idle: bool = False  # there for another rank's sake: its loss is 0, whatever it has

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
            clean_features=rollouts.features,
        )

    def without_views(self) -> "UpdateBatch":
        """The same with K = 0."""
        return replace(self, view_pixels=[], aux_view=None)

    def totals(self) -> Totals:
        """The counts of this batch."""
        return Totals(len(self.mask), int(self.mask.sum()), int(self.correct.sum()))

    def constants(self, rows: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """What `roma.roma_loss` takes beside hidden states, tokens and totals.

        Args:
            rows: [b] int64, rollouts; None: all of them, padded.
            mask: [b, T], that of these rollouts; with it comes the packed form, [N] counted tokens.
        """
        own = slice(None) if rows is None else rows
        optional = {
            "old_logp": self.old_logp,
            "ref_logp": self.ref_logp,
            "rollout_weight": self.rollout_weight,
        }
        by_token = {name: x[own] for name, x in optional.items() if x is not None}
        by_token["mask"] = self.mask[own]
        advantages = self.advantages[own]
        if advantages.ndim == 2:
            by_token["advantages"] = advantages
        if mask is not None:
            by_token = {name: x[mask] for name, x in by_token.items()}
        found: dict[str, Any] = {"advantages": advantages, "correct": self.correct[own], **by_token}
        if self.aux_view is not None:
            found["aux_view"] = self.aux_view[own]
        return found

    def split(self, size: int) -> Iterator["UpdateBatch"]:
        """Batches of `size` prompts each, the last one perhaps smaller."""
        prompts = len(self.prompts.images)
        for start in range(0, prompts, size):
            yield self.select(range(start, min(start + size, prompts)))

    def select(self, prompts: Sequence[int]) -> "UpdateBatch":
        """Some of the prompts, with all of their rollouts."""
        own, count = list(prompts), len(self.prompts.images)
        if own == list(range(count)):
            return self
        every = torch.arange(len(self.group)).view(count, -1)
        rows = every[own].flatten().to(self.group.device)
        images = [i for p in own for i in self.prompts.images_of(p)]
        features = self.clean_features
        return replace(
            self,
            prompts=self.prompts.select(own),
            view_pixels=[self.prompts.gather(pixels, own) for pixels in self.view_pixels],
            group=torch.arange(len(own), device=rows.device).repeat_interleave(every.shape[1]),
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            advantages=self.advantages[rows],
            correct=self.correct[rows],
            aux_view=None if self.aux_view is None else self.aux_view[rows],
            old_logp=None if self.old_logp is None else self.old_logp[rows],
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            rollout_weight=None if self.rollout_weight is None else self.rollout_weight[rows],
            clean_features=None if features is None else features.gather(images),
        )


def partition(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Cuts items into parts of about equal size: the largest first, each to the smallest part.

    Args:
        sizes: of the items, tokens.
        parts: at least 1; some stay empty if there are fewer items.

    Returns:
        The numbers of the items in each part, ascending.

    Example:
        >>> partition([5, 1, 1, 3], 2)
        [[0], [1, 2, 3]]
    """
    made: list[list[int]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        smallest = filled.index(min(filled))
        made[smallest].append(item)
        filled[smallest] += sizes[item]
    return sorted((sorted(own) for own in made), key=lambda own: own[:1] or [len(sizes)])


def micro_batches(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """The fewest parts, about equal, that hold at most `limit` tokens; a larger item stands alone.

    Example:
        >>> micro_batches([5, 1, 1, 3, 9], 6)
        [[0], [1, 2, 3], [4]]
    """
    alone = [[i] for i, size in enumerate(sizes) if size > limit]
    rest = [i for i, size in enumerate(sizes) if size <= limit]
    count = max(-(-sum(sizes[i] for i in rest) // limit), 1)
    while True:
        made = partition([sizes[i] for i in rest], count)
        parts = [[rest[i] for i in own] for own in made if own]
        if all(sum(sizes[i] for i in own) <= limit for own in parts):
            return sorted([*alone, *parts])
        count += 1
