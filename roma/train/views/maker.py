"""Views of a step's images, made while training: K degraded versions of each prompt's images.

They depend on images and keys alone, so a thread makes them while the policy samples.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from roma.data import Example
from roma.models.processor import Image
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.train import ranks
from roma.train.config.sections import AlgorithmConfig, ViewsConfig
from roma.views import (
    ADVERSARIAL,
    CORRUPTIONS,
    Corruption,
    ViewSpec,
    degrade_batch,
    load_levels,
    sample,
    sample_attacks,
    seed_for,
)
from roma_kernels.errors import fail

MASKED = 0.6
"""Chance of a patch to be black in masked views: PAPO's (arXiv 2507.06448), SRPO's."""


@dataclass(frozen=True)
class Views:
    """K views of P prompts."""

    specs: list[list[ViewSpec]]  # [K][P]
    images: list[list[list[Image]]]  # [K][P], per prompt its degraded images
    pixels: list[Tensor]  # K of [Σ gh·gw, C], the patches of all prompts' images
    seconds: float = 0.0  # that making them took
    divergence: Tensor | None = None  # [K, P] nats, of views that were made for it

    @classmethod
    def none(cls) -> "Views":
        """K = 0."""
        return cls([], [], [])

    def keep(self, prompts: PromptBatch, kept: Sequence[Sequence[int]]) -> "Views":
        """The views kept[p] of each prompt p, the same number for all prompts."""
        patches = [prompts.patches(p) for p in range(len(kept))]
        columns = list(zip(*kept, strict=True))
        return Views(
            [[self.specs[view][p] for p, view in enumerate(column)] for column in columns],
            [[self.images[view][p] for p, view in enumerate(column)] for column in columns],
            [
                torch.cat([self.pixels[view][patches[p]] for p, view in enumerate(column)])
                for column in columns
            ],
            self.seconds,
        )

    def applied_to(self, prompts: PromptBatch) -> PromptBatch:
        """The prompts with the images of the first view."""
        return replace(prompts, images=self.images[0], pixel_values=self.pixels[0])

    def metrics(self) -> dict[str, float]:
        """Mean level of all ranks, and the time that making the views took; nothing without any.

        A view that has a parameter and no level, as one with black patches, is left out of the
        mean.
        """
        if not self.specs:
            return {}
        own = [s.level for column in self.specs for s in column if s.level is not None]
        levels = [level for part in ranks.told(own) for level in part]
        mean = {"views/level_mean": sum(levels) / len(levels)} if levels else {}
        return {**mean, **self._divergence(), "timing_s/make_views": self.seconds}

    def _divergence(self) -> dict[str, float]:
        """Mean over the views of all ranks' images, where it is known."""
        if self.divergence is None:
            return {}
        seen = [p for p, own in enumerate(self.images[0]) if own]
        own = self.divergence[:, seen].flatten().tolist()
        found = [value for part in ranks.told(own) for value in part]
        return {"views/divergence_mean": sum(found) / len(found)} if found else {}

    def beside(self, others: "Views") -> "Views":
        """These views, then others of the same prompts; their time is added."""
        return Views(
            self.specs + others.specs,
            self.images + others.images,
            self.pixels + others.pixels,
            self.seconds + others.seconds,
        )

    def rows(self, examples: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """A row of views.jsonl per prompt with images, with every parameter of its views."""
        for example, specs in zip(examples, zip(*self.specs, strict=True), strict=True):
            if example.images:
                yield {"id": example.id, "views": [asdict(spec) for spec in specs]}


class Mode(NamedTuple):
    """What a view mode makes of a prompt's images, and who sees it."""

    drawn: int = 0
    """Views drawn from `algorithm.views.pool`."""
    masked: int = 0
    """Views with black patches, behind those that are drawn."""
    rollouts: Literal["none", "all", "some"] = "none"
    """Which rollouts of a prompt are sampled on its view, the first."""
    loss: bool = False
    """Whether the loss sees the views."""
    chooses: bool = False
    """Whether more views are drawn than kept."""
    attacked: int = 0
    """Views made against the policy, after the rollouts, behind those that are drawn."""
    searches: bool = False
    """Whether the levels of drawn views follow from the policy, after the rollouts."""

    @property
    def late(self) -> bool:
        """Whether views wait for the rollouts."""
        return self.chooses or self.searches or self.attacked > 0


def modes(options: ViewsConfig) -> dict[str, Mode]:
    """Each value of `algorithm.view_mode`."""
    made = options.candidates or options.k
    attacked = options.k if options.pool == ADVERSARIAL else options.attack.count
    many = Mode(
        made - attacked,
        loss=True,
        chooses=made > options.k,
        attacked=attacked,
        searches=options.target_divergence is not None,
    )
    return {
        "none": Mode(),
        "roma": many,
        "rollout": Mode(1, rollouts="all"),
        "noisy_rollout": Mode(1, rollouts="some"),
        "papo": Mode(masked=1, loss=True),
        "dvrp": Mode(1, masked=1, loss=True),
    }


class ViewMaker:
    """Makes views of clean images at model resolution, keyed by (run seed, step, row, view).

    Args:
        algorithm: view mode, pool, K and levels.
        seed: of the run.
        device: of the policy.

    Attributes:
        mode: what is made, and who sees it.
        level_share: of a step, the factor of its highest level, 0..1; for a schedule.
        masked: what is done to a masked view of the mode.
    """

    def __init__(self, algorithm: AlgorithmConfig, seed: int, device: torch.device) -> None:
        """Reads the level table, if the options name one.

        Raises:
            ValueError: views are to be made on a GPU and the policy is not on one; a bad table.
            FileNotFoundError: there is no such table.
        """
        self.options, self.seed = algorithm.views, seed
        if self.options.device == "cuda" and device.type != "cuda":
            expected, remedy = "cpu, as the policy is not on a GPU", "leave it out"
            fail("algorithm.views.device", expected, self.options.device, remedy)
        self.corruptions = _corruptions(self.options.level_table)
        # The only place that asks for the mode.
        self.mode = modes(self.options)[algorithm.view_mode]
        self.level_share: Callable[[int], float] = lambda step: 1.0
        self.masked = ViewSpec("patch_mask", MASKED)
        self._check_draw()
        self._thread = ThreadPoolExecutor(1, "roma-view-maker")

    def _check_draw(self) -> None:
        """Has the pool, K and the levels checked before the run."""
        try:
            self._draw([""], self.options.ramp_steps + 1)
            self.attacks([""], self.options.ramp_steps + 1)
        except ValueError as error:  # of pool, k or max_level, as `sample` calls them
            text = str(error)
            if self.options.candidates and text.startswith("k:"):  # of which k are kept
                text = "candidates" + text[1:]
            raise ValueError(f"algorithm.views.{text}") from error

    @property
    def count(self) -> int:
        """Views of a prompt, those that are masked or attacks among them."""
        return self.mode.drawn + self.mode.masked + self.mode.attacked

    @property
    def rollouts_see_views(self) -> bool:
        """Whether every rollout is sampled on the view."""
        return self.mode.rollouts == "all"

    @property
    def some_rollouts_see_views(self) -> bool:
        """Whether some rollouts of a prompt are sampled on the view, the others on the image."""
        return self.mode.rollouts == "some"

    @property
    def loss_sees_views(self) -> bool:
        """Whether views are in the loss."""
        return self.mode.loss

    def max_level(self, step: int) -> float:
        """The highest level drawn in a step, counted from 1; rises over the first ramp_steps."""
        share = step / self.options.ramp_steps if self.options.ramp_steps else 1.0
        return self.options.max_level * min(share, 1.0) * self.level_share(step)

    def start(
        self, policy: Policy, prompts: PromptBatch, examples: Sequence[Example], step: int
    ) -> "Future[Views]":
        """Has a thread run `make`; the future holds what it returned or raised."""
        return self._thread.submit(self.make, policy, prompts, examples, step)

    def start_masked(
        self, policy: Policy, prompts: PromptBatch, examples: Sequence[Example], step: int
    ) -> "Future[Views]":
        """Has the thread make one view of each prompt with black patches, in any mode.

        Its chance is always 0.6: that of `masked` is the mode's.
        """
        specs = [[ViewSpec("patch_mask", MASKED)] * len(examples)]
        return self._thread.submit(self._make, policy, prompts, examples, specs, (step, "masked"))

    def make(
        self, policy: Policy, prompts: PromptBatch, examples: Sequence[Example], step: int
    ) -> Views:
        """The views of each prompt that need no policy; its images share a view's corruption.

        Raises:
            ValueError: a view came out on another grid than the clean image's.
        """
        if self.mode.searches:
            return Views.none()
        return self.at(policy, prompts, examples, self.draw(examples, step), step)

    def at(
        self,
        policy: Policy,
        prompts: PromptBatch,
        examples: Sequence[Example],
        specs: list[list[ViewSpec]],
        step: int,
    ) -> Views:
        """The views that specs [K][P] ask for, each with the noise that it always has."""
        return self._make(policy, prompts, examples, specs, (step,)) if specs else Views.none()

    def draw(self, examples: Sequence[Example], step: int) -> list[list[ViewSpec]]:
        """What is done to the images of each prompt, [K][P]; masked views come last."""
        return self._draw([example.id for example in examples], step)

    def attacks(self, ids: Sequence[str], step: int) -> list[list[ViewSpec]]:
        """The attacks on the images of each prompt, [attacked][P]."""
        if not self.mode.attacked:
            return []
        drawn = [
            sample_attacks(
                self.mode.attacked,
                (self.seed, step, own),
                corruptions=self.corruptions,
                max_level=self.max_level(step),
                strength=self.options.strength,
            )
            for own in ids
        ]
        return [list(column) for column in zip(*drawn, strict=True)]

    def _draw(self, ids: Sequence[str], step: int) -> list[list[ViewSpec]]:
        options, most = self.options, self.max_level(step)
        drawn = [  # [P][K]
            sample(
                options.pool,
                self.mode.drawn,
                (self.seed, step, own),
                corruptions=self.corruptions,
                max_level=most or options.max_level,
                strength=options.strength,
            )
            for own in ids
            if self.mode.drawn
        ]
        specs = [list(column) for column in zip(*drawn, strict=True)]
        if not most:  # a schedule has come down to the clean image
            specs = [[self._clean(spec) for spec in column] for column in specs]
        return specs + [[self.masked] * len(ids) for _ in range(self.mode.masked)]

    def _clean(self, spec: ViewSpec) -> ViewSpec:
        return ViewSpec(spec.corruption, self.corruptions[spec.corruption].identity, 0.0)

    def _make(
        self,
        policy: Policy,
        prompts: PromptBatch,
        examples: Sequence[Example],
        specs: list[list[ViewSpec]],
        key: tuple[int | str, ...],
    ) -> Views:
        """Views as the specs [K][P] say, their seeds those of a key, row, view and image."""
        begin = time.perf_counter()
        jobs = [
            (image, spec, seed_for(self.seed, *key, example.id, view, number))
            for view, column in enumerate(specs)
            for example, spec, images in zip(examples, column, prompts.images, strict=True)
            for number, image in enumerate(images)
        ]
        if not jobs:  # text alone
            blank: list[list[list[Image]]] = [[[] for _ in examples] for _ in specs]
            return Views(specs, blank, [prompts.pixel_values] * len(specs))
        clean, job_specs, seeds = map(list, zip(*jobs, strict=True))
        if self.options.device == "cuda":
            clean = [torch.from_numpy(image).to(policy.device) for image in clean]
        made = degrade_batch(clean, job_specs, seeds, corruptions=self.corruptions)
        arrays = (x if isinstance(x, np.ndarray) else x.numpy(force=True) for x in made)
        images = [[[next(arrays) for _ in own] for own in prompts.images] for _ in specs]
        pixels = [policy.view_pixels(prompts, view) for view in images]
        return Views(specs, images, pixels, time.perf_counter() - begin)


def _corruptions(table: str | None) -> Mapping[str, Corruption]:
    if table is None:
        return CORRUPTIONS
    if not Path(table).is_file():
        got = f"{table!r}, and no file at {Path(table).resolve()}"
        remedy = "correct the path, which is relative to the working directory"
        fail("algorithm.views.level_table", "a YAML file", got, remedy, error=FileNotFoundError)
    return load_levels(table)


def hardest(divergence: Tensor, counted: Tensor, k: int) -> list[list[int]]:
    """The k of each prompt's M candidates on which the policy diverges most.

    Args:
        divergence: [M, B] nats, B = P·G rollouts, prompt after prompt.
        counted: [P, G] bool: rollouts to average over; of a prompt that has none, all.
        k: number to keep, at most M.

    Returns:
        P lists of k indices, ascending; of equal candidates the earlier ones.
    """
    counted = counted | ~counted.any(1, keepdim=True)
    grouped = divergence.view(len(divergence), *counted.shape)
    mean = (grouped * counted).sum(-1) / counted.sum(-1)
    order = mean.argsort(dim=0, descending=True, stable=True)[:k]
    kept: list[list[int]] = order.sort(dim=0).values.T.tolist()
    return kept


def by_corruption(divergence: Tensor, specs: Sequence[Sequence[ViewSpec]]) -> Mapping[str, float]:
    """Mean divergence of each corruption, and its share of the sequences' worst views.

    Args:
        divergence: [K, B] nats, B = P·G rollouts, prompt after prompt; NaN for those that do not
            count.
        specs: [K][P].

    Returns:
        Metrics under `roma_penalty/<corruption>` and `roma_worst_view/<corruption>`, of the
        corruptions that a counted rollout has.
    """
    values = divergence.numpy(force=True)
    group_size = values.shape[1] // len(specs[0])
    names = np.array([[spec.corruption for spec in column] for column in specs])
    names = names.repeat(group_size, axis=1)
    counted = ~np.isnan(values).any(0)
    values, names = values[:, counted], names[:, counted]
    worst = names[values.argmax(0), np.arange(values.shape[1])]
    metrics = {}
    for name in np.unique(names):
        metrics[f"roma_penalty/{name}"] = float(values[names == name].mean())
        metrics[f"roma_worst_view/{name}"] = float((worst == name).mean())
    return metrics
