"""Intervals that cover both choices of an experiment: its test images and its training seeds.

Accuracy differs from image to image, and one recipe trained with another seed is another model. Of
scores (or paired differences) d_si of seed s on image i the mean over both is reported. In

    d_si = μ + a_s + b_i + c_si        seeds, images, and what the two do together

the mean has the variance Var a/S + Var b/n + Var c/(S·n). Its draws are

    draw_r = μ̂ + f (draw r over images of (1/S) Σ_s d_si − μ̂)       the Bayesian bootstrap, paired
               + t_r · sd_s(d̄_s) / √S                               Student's t, S − 1 degrees

with d̄_s seed s's mean over images. Var of the second term is Var a/S + Var c/(S·n), that of the
bootstrap Var b/n + Var c/(S·n); f² = Var b/(Var b + Var c/S), estimated by the mean squares of the
table, leaves it Var b/n, so that nothing is counted twice. An end is at least as far out as the
bootstrap's own: seeds that agree by chance do not make an interval narrower than one over images.

Resampling seeds and images both, as a bootstrap in two levels does, is the usual way; with three
seeds or five its 95 % intervals hold in 92 to 99.5 % of cases, too few where seeds matter and too
many where they do not (Owen 2007, Annals of Applied Statistics 1, 386-411, proves the latter),
these in 95 to 98.5 %, and those over images alone in 62 to 95 %:
`python -m experiments.coverage seeds`.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roma.evaluate.intervals import Bootstrap, Interval
from roma_kernels.errors import fail

Floats = NDArray[np.float64]

_MORE = 4
"""t's drawn to one draw over images: its tails need them."""


class Hierarchy:
    """Intervals over test images and training seeds; all share their draws.

    Args:
        images: n, the number of test images, ≥ 1.
        resamples: R, the number of draws over images.
        seed: of local generators; the same seed gives the same intervals, bit for bit.

    Raises:
        ValueError: no images, or no draws.

    Example:
        >>> seeds = np.array([[[1.0, 0, 1, 1]], [[1, 0, 1, 0]]])  # two seeds, one column, 4 images
        >>> one, two = Hierarchy(4).intervals(seeds[:1])[0], Hierarchy(4).intervals(seeds)[0]
        >>> one == Bootstrap(4).intervals(seeds[0])[0], two.high - two.low > one.high - one.low
        (True, True)
    """

    def __init__(self, images: int, *, resamples: int = 10_000, seed: int = 0) -> None:
        """Draws the weights of the images."""
        self._images = Bootstrap(images, resamples=resamples, seed=seed)
        self._seed = seed

    @property
    def coverage(self) -> float:
        """Of the intervals, in (0, 1)."""
        return self._images.coverage

    def intervals(self, scores: ArrayLike) -> list[Interval]:
        """Mean accuracies over seeds and images in percent, one for each of M columns.

        Args:
            scores: [S, M, n] in 0..1 of S seeds, per image. With S = 1 the intervals are the
                bootstrap's over images alone.

        Raises:
            ValueError: `scores` is not [S, M, n] with this n, or leaves 0..1.
        """
        rows = _checked(scores)
        return self._of(self._images.seen(rows.mean(0)), rows)

    def differences(self, first: ArrayLike, second: ArrayLike) -> list[Interval]:
        """Mean paired differences, first minus second, in points.

        Args:
            first: [S, M, n] in 0..1, per image; seed s of both arms saw the same training data in
                the same order.
            second: the same of the other arm.

        Raises:
            ValueError: the two differ in shape, are not [S, M, n] with this n, or leave 0..1.
        """
        one, other = _checked(first), _checked(second)
        if one.shape != other.shape:
            got = f"{list(one.shape)} and {list(other.shape)}"
            fail("scores", "two arrays of one shape", got, "give both arms the same seeds")
        seen = self._images.seen(one.mean(0)) - self._images.seen(other.mean(0), arm=2)
        return self._of(seen, one - other)

    def _of(self, seen: Floats, rows: Floats) -> list[Interval]:
        """Intervals of M means: [M, n + 4] as the bootstrap sees them, [S, M, n] by seed."""
        found, seeds = self._images.estimate(seen), len(rows)
        alone = found.intervals(self.coverage)
        if seeds == 1:
            return alone
        generator = np.random.default_rng([self._seed, seeds])
        drawn = generator.standard_t(seeds - 1, (_MORE * len(found.draws), 1))
        error = rows.mean(2).std(0, ddof=1) / math.sqrt(seeds)
        images = found.means + _images_share(rows) * (found.draws - found.means)
        both = replace(found, draws=np.tile(images, (_MORE, 1)) + drawn * error)
        return [
            replace(one, low=min(one.low, other.low), high=max(one.high, other.high))
            for one, other in zip(both.intervals(self.coverage), alone, strict=True)
        ]


def _images_share(rows: Floats) -> Floats:
    """The f of each column: what of the spread over images is there with any number of seeds."""
    seeds, _, images = rows.shape
    over_seeds = rows.mean(0)  # [M, n]
    spread = over_seeds.var(1, ddof=1) if images > 1 else np.zeros(len(over_seeds))
    both = rows - rows.mean(2, keepdims=True) - over_seeds + over_seeds.mean(1, keepdims=True)
    noise = (both**2).sum((0, 2)) / ((seeds - 1) * max(images - 1, 1)) / seeds
    # Where no image differs from another there is no table to go by.
    share = 1 - noise / np.where(spread > 0, spread, np.inf)
    return np.sqrt(np.maximum(share, 0))


def _checked(scores: ArrayLike) -> Floats:
    rows = np.asarray(scores, dtype=np.float64)
    if rows.ndim != 3 or not rows.size:
        remedy = "stack the seeds of an arm"
        fail("scores", "[S, M, n], a seed at least", str(list(rows.shape)), remedy)
    return rows
