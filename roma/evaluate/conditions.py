"""The conditions of an evaluation and the test images at each: clean, and corruptions at levels.

Images are brought to model resolution once and degraded there, so the grid, and with it the number
of image tokens, cannot change. Every model evaluated on one `DegradedImages` sees the same pixels,
which is what makes differences between arms paired.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma.data import Example
from roma.views import CORRUPTIONS, Corruption, ViewSpec, degrade_batch, seed_for
from roma_kernels.errors import fail

Image = NDArray[np.uint8]
"""[H, W, 3] RGB, 0..255."""


@dataclass(frozen=True)
class Cell:
    """One condition of the images: a corruption of a pool at a level, or (the default) clean."""

    pool: str = "clean"
    corruption: str | None = None
    level: int = 0

    def __str__(self) -> str:
        """As shown in plots: "clean" or "gaussian_noise L3"."""
        return f"{self.corruption} L{self.level}" if self.corruption else "clean"


def described(cell: Cell, corruptions: Mapping[str, Corruption]) -> dict[str, Any]:
    """A cell with what it does to an image, in whatever table that stood; JSON-able."""
    where = {"pool": cell.pool, "corruption": cell.corruption, "level": cell.level}
    if cell.corruption is None:
        return where
    own = corruptions[cell.corruption]
    return where | {"parameter": own.parameter(cell.level), "reference_size": own.reference_size}


def cells_of(
    pools: Sequence[str], levels: Sequence[int], corruptions: Mapping[str, Corruption] = CORRUPTIONS
) -> list[Cell]:
    """Every cell of `pools` and `levels`, with all corruptions of a pool; "clean" is one cell.

    Args:
        pools: of "clean" and the pools in `corruptions` ("seen", "unseen", "extra", "masking",
            "adversarial").
        levels: severities, 1 for the mildest; measured in this order, however they are given.
        corruptions: the table of levels.

    Raises:
        ValueError: a pool that is not there (the nearest is suggested), none at all, or a level
            that a corruption lacks.

    Example:
        >>> [str(cell) for cell in cells_of(["clean", "seen"], [3])][:2]
        ['clean', 'gaussian_noise L3']
    """
    known = ["clean", *dict.fromkeys(corruption.pool for corruption in corruptions.values())]
    if not pools:
        fail("pools", "some of " + ", ".join(known), "none", "name at least one pool")
    for pool in pools:
        if pool not in known:
            nearest = difflib.get_close_matches(pool, known, n=1, cutoff=0)[0]
            fail("pools", "some of " + ", ".join(known), repr(pool), f"did you mean {nearest!r}?")
    if not levels and set(pools) != {"clean"}:
        fail("levels", "at least one level", "none", "the customary levels are 1,2,3")
    cells = []
    for pool in dict.fromkeys(pools):
        members = [c for c in corruptions.values() if c.pool == pool]
        cells += [Cell()] if pool == "clean" else _cells_in(pool, members, levels)
    return cells


def _cells_in(pool: str, members: Iterable[Corruption], levels: Sequence[int]) -> list[Cell]:
    """The cells of one pool, corruption by corruption."""
    cells = []
    for corruption in members:
        for level in sorted(set(levels)):
            if not 1 <= level <= len(corruption.levels):
                expected = f"1 to {len(corruption.levels)}, the levels of {corruption.name}"
                fail("levels", expected, str(level), "leave it out, or give a table that has it")
            cells.append(Cell(pool, corruption.name, level))
    return cells


def degrade_at(
    cell: Cell,
    images: Sequence[Image],
    keys: Sequence[Sequence[int | str]],
    *,
    seed: int = 0,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
) -> list[Image]:
    """Images at a cell, of their own sizes; the noise of image i has a seed of its own.

    It is seed_for(seed, *keys[i], corruption, level): what else is degraded changes nothing.

    Args:
        cell: not clean.
        images: n images.
        keys: of each image, what tells it from all others: (example id, position), for example.
        seed: of the noise.
        corruptions: the table of levels.
    """
    name, level = cell.corruption, cell.level
    assert name is not None
    spec = ViewSpec(name, corruptions[name].parameter(level), float(level))
    seeds = [seed_for(seed, *key, name, level) for key in keys]
    return degrade_batch(images, [spec] * len(images), seeds, corruptions=corruptions)


class DegradedImages:
    """The images of the test examples at each cell, made on first use and then kept.

    The pixels of a cell depend on (seed, example id, position of the image in the example,
    corruption, level) alone: not on the model, the batch size, or which other cells are asked for.

    Args:
        examples: the test examples; their images are loaded here.
        cells: what `at` may be asked for, from `cells_of`.
        resize: brings an image to model resolution; None where it is there already.
        corruptions: the table of levels.
        seed: of the noise; a part of every image's own seed.
        keep: False makes a cell anew each time: for one model on many large images.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        cells: Sequence[Cell],
        *,
        resize: Callable[[Image], Image] | None = None,
        corruptions: Mapping[str, Corruption] = CORRUPTIONS,
        seed: int = 0,
        keep: bool = True,
    ) -> None:
        """Loads and resizes the clean images."""
        self.examples, self.cells = list(examples), list(cells)
        if not self.examples:
            fail("examples", "at least one", "none", "check the split and the limit")
        self._corruptions, self._seed, self._keep = corruptions, seed, keep
        self._clean = [  # one at a time: as they are stored they may be far larger
            [resize(image) if resize else image for image in example.load_images()]
            for example in self.examples
        ]
        self._made: dict[Cell, list[list[Image]]] = {}

    def at(self, cell: Cell) -> list[list[Image]]:
        """The images of every example at `cell`, of the clean images' sizes.

        Raises:
            KeyError: `cell` is neither clean nor one of `cells`.
        """
        if cell.corruption is None:
            return self._clean
        if cell not in self.cells:
            raise KeyError(cell)
        if cell in self._made:
            return self._made[cell]
        flat = [image for images in self._clean for image in images]
        keys = [
            (example.id, position)
            for example, images in zip(self.examples, self._clean, strict=True)
            for position in range(len(images))
        ]
        degraded = iter(
            degrade_at(cell, flat, keys, seed=self._seed, corruptions=self._corruptions)
        )
        made = [[next(degraded) for _ in images] for images in self._clean]
        if self._keep:
            self._made[cell] = made
        return made

    def make_all(self) -> "DegradedImages":
        """Makes every cell now, e.g. before the object is pickled for worker processes."""
        for cell in self.cells:
            self.at(cell)
        return self
