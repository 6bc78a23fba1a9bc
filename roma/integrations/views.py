"""`ViewMaker`: K degraded versions of what the model sees of each row's images.

A draw is a function of (view_seed, step, the row's clean images) and of nothing else: the rollouts
of a prompt share their views, whatever rank or micro-batch they are in.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma.integrations.options import RomaOptions
from roma.integrations.pixels import PixelFormat
from roma.views import ViewSpec, degrade_batch, seed_for
from roma_kernels.errors import fail

Pair = tuple[int, int]  # (view k, row b)


@dataclass(frozen=True)
class RowImages:
    """The clean images of B rows, and the views drawn for them.

    Attributes:
        images: per row its images, [H, W, 3] uint8 on the CPU; none for text alone.
        keys: per row a digest of its images, "" for text alone.
        specs: [B][K], what each view does; rows without an image have none.
        step: that they were drawn for.
        like: the clean pixel_values.
        grid: [n, 3] of all images, or None.
    """

    images: list[list[Tensor]]
    keys: list[str]
    specs: list[list[ViewSpec]]
    step: int
    like: Tensor
    grid: Tensor | None

    @property
    def has_views(self) -> Tensor:
        """[B] bool, CPU: rows with an image."""
        return torch.tensor([bool(own) for own in self.images])

    def corruption(self, pair: Pair) -> str:
        """The corruption of view k of row b."""
        view, row = pair
        return self.specs[row][view].corruption


class ViewMaker:
    """Makes views of a micro-batch's pixel_values.

    Args:
        options: how many views, of which pool and levels.
        image_processor: the transformers image processor that made the pixel_values.

    Raises:
        ValueError: the processor's pixels cannot be turned back into images.
    """

    def __init__(self, options: RomaOptions, image_processor: Any) -> None:
        """Finds out how the processor lays out an image."""
        if options.view_device == "cuda" and not torch.cuda.is_available():
            fail("view_device", "'cpu', as there is no GPU", "'cuda'", "leave it out")
        options.draw("a check")  # a pool is there
        self.options, self.format = options, PixelFormat.of(image_processor)
        self._corruptions = options.corruptions

    def read(
        self,
        pixel_values: Tensor | None,
        grid: Tensor | None,
        counts: Sequence[int],
        *,
        step: int,
    ) -> RowImages:
        """The images of B rows, and what their views do.

        Args:
            pixel_values: the clean ones of all rows, row after row; None: text alone.
            grid: [n, 3] image_grid_thw, or None where pixel_values is [n, 3, H, W].
            counts: B numbers of images (tiles, where an image has several).
            step: of the run; every reuse of a rollout takes the one that it was sampled in.

        Raises:
            ValueError: the numbers do not fit, or the values are not the processor's.
        """
        if pixel_values is None:
            blank: list[list[Tensor]] = [[] for _ in counts]
            return RowImages(
                blank, [""] * len(counts), [[] for _ in counts], step, torch.empty(0), grid
            )
        made = [image.cpu() for image in self.format.images(pixel_values, grid)]
        if len(made) != sum(counts):
            remedy = "hand on the number of images of each row"
            fail("pixel_values", f"{sum(counts)} images, the sum of counts", str(len(made)), remedy)
        rest = iter(made)
        images = [[next(rest) for _ in range(count)] for count in counts]
        keys = [_digest(own) if own else "" for own in images]
        drawn = {key: self.options.draw(step, key) for key in dict.fromkeys(keys) if key}
        specs = [drawn.get(key, []) for key in keys]
        return RowImages(images, keys, specs, step, pixel_values, grid)

    def aux_view(self, rows: RowImages, completions: Sequence[Sequence[int]]) -> Tensor:
        """[B] int64, CPU: the sampled view of each row, a function of its images and completion.

        Args:
            rows: of B rows.
            completions: B lists of token ids.
        """
        return draw_aux_view(self.options, rows.keys, completions, step=rows.step)

    def pixels(self, rows: RowImages, pairs: Sequence[Pair]) -> Tensor:
        """The pixel_values of pairs (view, row), pair after pair, like the clean ones.

        A view of a prompt that several rows share is made once.

        Raises:
            ValueError: a view came out in another size than the clean image.
        """
        jobs: dict[tuple[str, int], list[int]] = {}
        images: list[Tensor] = []
        specs, seeds = [], []
        for view, row in pairs:
            key = rows.keys[row]
            if (key, view) in jobs:
                continue
            first = len(images)
            for number, image in enumerate(rows.images[row]):
                images.append(image)
                specs.append(rows.specs[row][view])
                seeds.append(seed_for(self.options.view_seed, rows.step, key, view, number))
            jobs[key, view] = list(range(first, len(images)))
        if self.options.view_device == "cuda":
            images = [image.to(rows.like.device) for image in images]
        made = degrade_batch(images, specs, seeds, corruptions=self._corruptions) if images else []
        for clean, view_image in zip(images, made, strict=True):
            if clean.shape != view_image.shape:
                expected, got = str(list(clean.shape)), str(list(view_image.shape))
                fail("view", f"the clean image's size {expected}", got, "keep height and width")
        wanted = [made[i] for view, row in pairs for i in jobs[rows.keys[row], view]]
        return self.format.pixels(wanted, rows.like)


def draw_aux_view(
    options: RomaOptions, keys: Sequence[str], completions: Sequence[Sequence[int]], *, step: int
) -> Tensor:
    """[B] int64, CPU: a view in 0..K-1 of each row, a function of the arguments alone.

    Args:
        options: K and the seed.
        keys: of each row, what its views are of.
        completions: B lists of token ids.
        step: of the run.
    """
    drawn = []
    for key, tokens in zip(keys, completions, strict=True):
        completion = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes()).hexdigest()
        seed = seed_for("auxiliary view", options.view_seed, step, key, completion)
        drawn.append(seed % options.num_views)
    return torch.tensor(drawn)


def _digest(images: Sequence[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(repr(tuple(image.shape)).encode())
        digest.update(image.numpy().tobytes())
    return digest.hexdigest()
