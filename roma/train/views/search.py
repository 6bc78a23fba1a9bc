"""Views of a wanted divergence: the level of each is found by bisection.

A corruption's divergence is taken to grow with its level, all else being equal: the noise keeps its
seed from try to try. Where it does not, the level found is the nearest of those tried, no more. The
first try is the highest level: a view that does not reach the target there stays at it.

Passes over K views: `steps` forward, without a graph; one forward on the clean images. Each try
makes its views anew, while the policy waits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roma.train.views.probe import Probe
from roma.views import Corruption, ViewSpec

Make = Callable[[list[list[ViewSpec]]], Sequence[Tensor]]
"""From specs [K][P] the pixels of K views, each with the noise that it always has."""


@dataclass(frozen=True)
class Found:
    """The levels of K views of P prompts."""

    specs: list[list[ViewSpec]]  # [K][P]
    divergence: Tensor  # [K, P] nats, there; 0 without an image


def search_levels(
    probe: Probe,
    names: Sequence[Sequence[str]],
    make: Make,
    *,
    target: float,
    steps: int,
    highest: float,
    corruptions: Mapping[str, Corruption],
) -> Found:
    """For each view the level in 0..highest whose divergence is nearest to the target.

    Args:
        probe: of the policy and the prompts, for K views.
        names: [K][P]: the corruption of each view.
        make: makes views.
        target: nats, > 0: of a prompt's mean over the rollouts that count.
        steps: tries, at least 1; where divergence grows with the level, one is found to within
            highest · 2^(1 − steps).
        highest: level.
        corruptions: the table of levels.
    """

    def specs(levels: Tensor) -> list[list[ViewSpec]]:
        return [
            [
                ViewSpec(name, corruptions[name].parameter(level), level)
                for name, level in zip(own, row, strict=True)
            ]
            for own, row in zip(names, levels.tolist(), strict=True)
        ]

    shape = len(names), len(probe.batch.prompts.images)
    low = torch.zeros(shape, dtype=torch.float64)
    high = torch.full_like(low, highest)
    level, best, nearest = high, low, torch.zeros_like(low)  # level 0 is the image: D = 0
    for _ in range(steps):
        found = probe.divergence(make(specs(level))).double().cpu()
        better = (found - target).abs() < (nearest - target).abs()
        best, nearest = torch.where(better, level, best), torch.where(better, found, nearest)
        below = found < target
        low, high = torch.where(below, level, low), torch.where(below, high, level)
        level = (low + high) / 2
    return Found(specs(best), nearest)
