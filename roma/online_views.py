"""Views of a step's images, made while training: K degraded versions of each prompt's images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from roma.config import ViewsConfig
from roma.data import Example
from roma.policy import Policy, PromptBatch
from roma.views import CORRUPTIONS, ViewSpec, degrade_batch, load_levels, sample, seed_for


@dataclass(frozen=True)
class Views:
    """K views of P prompts."""

    specs: list[list[ViewSpec]]  # [K][P]
    pixels: list[Tensor]  # K of [Σ gh·gw, C], the patches of all prompts' images

    @classmethod
    def none(cls) -> "Views":
        """K = 0."""
        return cls([], [])


class OnlineViews:
    """Makes views from clean images at model resolution, keyed by (run seed, step, row, view).

    Args:
        options: pool, K, levels.
        seed: of the run.
    """

    def __init__(self, options: ViewsConfig, seed: int) -> None:
        """Reads the level table, if the options name one."""
        self.options, self.seed = options, seed
        table = options.level_table
        self.corruptions = load_levels(table) if table else CORRUPTIONS

    def make(
        self,
        policy: Policy,
        prompts: PromptBatch,
        examples: Sequence[Example],
        step: int,
        count: int,
    ) -> Views:
        """`count` views of each prompt; all images of a prompt share the view's corruption.

        Raises:
            ValueError: a view came out on another grid than the clean image's.
        """
        options = self.options
        specs = [
            sample(
                options.pool,
                count,
                (self.seed, step, example.id),
                corruptions=self.corruptions,
                max_level=options.max_level,
                strength=options.strength,
            )
            for example in examples
        ]
        wanted = [
            (image, own[view], seed_for(self.seed, step, example.id, view, number))
            for view in range(count)
            for example, own, images in zip(examples, specs, prompts.images, strict=True)
            for number, image in enumerate(images)
        ]
        images, chosen, seeds = map(list, zip(*wanted, strict=True))
        made = iter(degrade_batch(images, chosen, seeds, corruptions=self.corruptions))
        pixels = [
            policy.view_pixels(prompts, [[next(made) for _ in own] for own in prompts.images])
            for _ in range(count)
        ]
        return Views([[own[view] for own in specs] for view in range(count)], pixels)


def by_corruption(divergence: Tensor, specs: Sequence[Sequence[ViewSpec]]) -> Mapping[str, float]:
    """Mean divergence of each corruption, and the share of sequences whose worst view it is.

    Args:
        divergence: [K, B] nats, B = P·G rollouts, prompt after prompt.
        specs: [K][P].

    Returns:
        Metrics under `roma_penalty/<corruption>` and `roma_worst_view/<corruption>`.
    """
    values = divergence.numpy(force=True)
    group = values.shape[1] // len(specs[0])
    names = np.array([[spec.corruption for spec in own] for own in specs]).repeat(group, axis=1)
    worst = names[values.argmax(0), np.arange(values.shape[1])]
    metrics = {}
    for name in np.unique(names):
        metrics[f"roma_penalty/{name}"] = float(values[names == name].mean())
        metrics[f"roma_worst_view/{name}"] = float((worst == name).mean())
    return metrics
