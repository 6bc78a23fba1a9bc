"""Views of a step's images, made while training: K degraded versions of each prompt's images.

They depend on images and keys alone, so a thread makes them while the policy samples.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from roma.data import Example
from roma.models.qwen_vl import Policy, PromptBatch
from roma.train.config import AlgorithmConfig
from roma.train.metrics import JsonLines
from roma.views import CORRUPTIONS, ViewSpec, degrade_batch, load_levels, sample, seed_for
from roma_kernels.errors import fail


@dataclass(frozen=True)
class Views:
    """K views of P prompts."""

    specs: list[list[ViewSpec]]  # [K][P]
    pixels: list[Tensor]  # K of [Σ gh·gw, C], the patches of all prompts' images
    seconds: float = 0.0  # that making them took

    @classmethod
    def none(cls) -> "Views":
        """K = 0."""
        return cls([], [])

    def of_prompts(self, prompts: PromptBatch, kept: Sequence[Sequence[int]]) -> "Views":
        """Of prompt p the views kept[p], the same number of each."""
        patches = [prompts.patches(slice(p, p + 1)) for p in range(len(kept))]
        columns = list(zip(*kept, strict=True))
        return Views(
            [[self.specs[view][p] for p, view in enumerate(own)] for own in columns],
            [
                torch.cat([self.pixels[view][patches[p]] for p, view in enumerate(own)])
                for own in columns
            ],
            self.seconds,
        )


class OnlineViews:
    """Makes views from clean images at model resolution, keyed by (run seed, step, row, view).

    Args:
        algorithm: whether there are views, and pool, K and levels.
        seed: of the run.
    """

    def __init__(self, algorithm: AlgorithmConfig, seed: int) -> None:
        """Reads the level table, if the options name one."""
        self.mode, self.options, self.seed = algorithm.view_mode, algorithm.views, seed
        table = self.options.level_table
        self.corruptions = load_levels(table) if table else CORRUPTIONS
        self._thread = ThreadPoolExecutor(1, "roma-online-views")

    def max_level(self, step: int) -> float:
        """The strongest level drawn in a step, counted from 1; grows over the first ramp_steps."""
        share = step / self.options.ramp_steps if self.options.ramp_steps else 1.0
        return self.options.max_level * min(share, 1.0)

    def start(
        self, policy: Policy, prompts: PromptBatch, examples: Sequence[Example], step: int
    ) -> "Future[Views]":
        """What `make` returns or raises, once a thread has made it; none in mode "none"."""
        if self.mode == "none":
            nothing: Future[Views] = Future()
            nothing.set_result(Views.none())
            return nothing
        count = 1 if self.mode == "rollout" else self.options.candidates or self.options.k
        return self._thread.submit(self.make, policy, prompts, examples, step, count)

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
        begin, options = time.perf_counter(), self.options
        specs = [
            sample(
                options.pool,
                count,
                (self.seed, step, example.id),
                corruptions=self.corruptions,
                max_level=self.max_level(step),
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
        if options.device == "cuda":
            if policy.device.type != "cuda":
                expected, remedy = "cpu, as the policy is not on a GPU", "leave it out"
                fail("algorithm.views.device", expected, options.device, remedy)
            images = [torch.from_numpy(image).to(policy.device) for image in images]
        views = degrade_batch(images, chosen, seeds, corruptions=self.corruptions)
        made = (view if isinstance(view, np.ndarray) else view.numpy(force=True) for view in views)
        pixels = [
            policy.view_pixels(prompts, [[next(made) for _ in own] for own in prompts.images])
            for _ in range(count)
        ]
        seconds = time.perf_counter() - begin
        return Views([[own[view] for own in specs] for view in range(count)], pixels, seconds)


def record(
    views: Views, examples: Sequence[Example], step: int, log: JsonLines | None
) -> dict[str, float]:
    """What the views of a step are: metrics, and a line per prompt with every parameter."""
    specs = [spec for own in views.specs for spec in own]
    if log:
        by_prompt = zip(examples, zip(*views.specs, strict=True), strict=True)
        log.write(
            step,
            (
                {"id": example.id, "views": [asdict(spec) for spec in own]}
                for example, own in by_prompt
            ),
        )
    return {
        "views/level_mean": sum(spec.level or 0.0 for spec in specs) / len(specs),
        "timing_s/make_views": views.seconds,
    }


def hardest(divergence: Tensor, counted: Tensor, k: int) -> list[list[int]]:
    """Of each prompt's M candidates the k on which the policy diverges most.

    Args:
        divergence: [M, B] nats, B = P·G rollouts, prompt after prompt.
        counted: [P, G] bool: rollouts whose mean decides; all of a prompt that has none.
        k: how many are kept, at most M.

    Returns:
        P lists of k places, ascending; of equal candidates the earlier is kept.
    """
    counted = counted | ~counted.any(1, keepdim=True)
    by_prompt = divergence.view(len(divergence), *counted.shape)
    mean = (by_prompt * counted).sum(-1) / counted.sum(-1)
    order = mean.argsort(dim=0, descending=True, stable=True)[:k]
    kept: list[list[int]] = order.sort(dim=0).values.T.tolist()
    return kept


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
