"""Accuracies with intervals that are paired over images: every statistic has the same draws.

Scores are per image, in 0..1. A draw r gives each of the n images a weight, and four imagined
images a smaller one (the Bayesian bootstrap; Rubin 1981, Annals of Statistics 9, 130-134):

    w_ri ~ Gamma(1)      each of the n images
    w_rj ~ Gamma(3/8)    imagined: the first arm is right and the second wrong; the reverse
    w_rj ~ Gamma(1/8)    imagined: both are right; both are wrong
    mean_r = Σ w_ri s_i / Σ w_ri, over all n + 4        interval = [q_2.5 %, q_97.5 %] of mean_r

The mean that is printed is the plain one, (1/n) Σ_i s_i over the n images; an interval whose end
does not reach it is stretched to it.

Why the four. Resampling alone knows no score that was not seen: of two images none right, it says
[0, 0]. To one arm the four are half an image that is right and half of one that is wrong, so that
k right of n have draws from Beta(k + ½, n − k + ½), whose quantiles are Jeffreys' interval (Brown,
Cai and DasGupta 2001, Statistical Science 16, 101-133). How the two halves are shared between two
arms decides how often the interval of a difference holds at small n: with ¼ for each kind (Agresti
and Min 2005, Statistics in Medicine 24, 729-740, look at such tables) 93 to 94 % at n = 5 and 10,
with ½ for the two discordant kinds alone 96 to 97 %, with 3/8 and 1/8 between 94 and 96 %. Scores
in between, of a macro average, are weighted alike. Coverage, measured: docs/EVALUATION.md.

One `Bootstrap` stands for one set of weights, so that two arms, two corruptions or two seeds are
always compared on the same draws. The interval covers the choice of test images. It does not cover
the training seeds, which a report shows one by one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roma_kernels.errors import fail

Floats = NDArray[np.float64]

_BLOCK = 2**20  # weights made at a time: 8 MB of float64, the draws of 2,000 images by 500
_HELD = 2**25  # bytes of weights that are kept; more are made anew each time
_FIRST, _SECOND = (1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 1.0, 0.0)  # scores of the imagined images
_IMAGINED = (3 / 8, 3 / 8, 1 / 8, 1 / 8)  # and their weights, in images; the sum is 1
_MORE = len(_IMAGINED)
_SAME = 1e-9  # scores closer than this differ by the rounding of an average alone


@dataclass(frozen=True)
class Interval:
    """A mean and its interval over `n` images, in percent; for a difference, in points."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """The form of report.json; the rounding is far below any interval's width."""
        return {
            "mean": round(self.mean, 3),
            "low": round(self.low, 3),
            "high": round(self.high, 3),
            "n": self.n,
        }


@dataclass(frozen=True)
class Estimate:
    """M statistics and their draws.

    Attributes:
        means: [M], the plain means over images.
        draws: [R, M], of the same unit.
        least, most: [M], the bounds of each: its values on the imagined images.
        images: n.
    """

    means: Floats
    draws: Floats
    least: Floats
    most: Floats
    images: int

    def __getitem__(self, some: slice | Sequence[int]) -> "Estimate":
        """Those statistics."""
        least, most = self.least[some], self.most[some]
        return Estimate(self.means[some], self.draws[:, some], least, most, self.images)

    def over(self, below: "Estimate") -> "Estimate":
        """The quotients of these statistics and others, all ≥ 0; 0 where the mean below is 0."""
        right = below.means > 0
        means = np.where(right, self.means, 0) / np.where(right, below.means, 1)
        # Draws of an average may touch 0; a tenth of a right answer is far below any mean.
        draws = np.maximum(self.draws, 0) / np.maximum(below.draws, 0.1 / self.images)
        bounds = np.zeros_like(means), np.full_like(means, np.inf)
        return Estimate(means, draws, *bounds, self.images)

    def intervals(self, coverage: float = 0.95) -> list[Interval]:
        """Each mean with its interval, ×100."""
        ends = np.percentile(self.draws, (50 * (1 - coverage), 50 * (1 + coverage)), axis=0)
        low, high = np.clip(ends, self.least, self.most)
        low, high = np.minimum(low, self.means), np.maximum(high, self.means)
        rows = zip(*((100 * each).tolist() for each in (self.means, low, high)), strict=True)
        return [Interval(mean, least, most, self.images) for mean, least, most in rows]


class Bootstrap:
    """Weights of `images` images, drawn once and shared by every statistic.

    Args:
        images: n, the number of test images, ≥ 1.
        resamples: R, the number of draws; the Monte-Carlo error of an end falls as 1/√R.
        seed: of a local generator; the same seed gives the same intervals, bit for bit.
        coverage: of the interval, in (0, 1).

    Raises:
        ValueError: no images, no draws, or a coverage outside (0, 1).

    Example:
        >>> found = Bootstrap(2).intervals([[0, 0]])[0]  # 97.5 % of Beta(½, 2½) are below 0.667
        >>> found.mean, found.low, 65 < found.high < 69
        (0.0, 0.0, True)
    """

    def __init__(
        self, images: int, *, resamples: int = 10_000, seed: int = 0, coverage: float = 0.95
    ) -> None:
        """Holds the weights, where they are few enough."""
        if images < 1:
            fail("images", "at least 1", str(images), "evaluate on a split that is not empty")
        if resamples < 1:
            fail("resamples", "at least 1", str(resamples), "10000 is customary")
        if not 0 < coverage < 1:
            fail("coverage", "a number between 0 and 1", repr(coverage), "0.95 is customary")
        self.images, self.resamples, self.coverage = images, resamples, coverage
        self._seed = seed
        few = resamples * (images + _MORE) * np.dtype(np.float32).itemsize <= _HELD
        self._kept = list(self._made()) if few else None

    def seen(self, scores: ArrayLike, *, arm: Literal[1, 2] = 1) -> Floats:
        """Scores with those of the four imagined images behind them: [M, n] to [M, n + 4].

        A statistic of two arms is computed on what this returns, image by image, and given to
        `estimate`: `seen(clean) - seen(degraded, arm=2)` for a drop.

        Args:
            scores: [M, n] in 0..1.
            arm: 1 for the first of two that are compared, 2 for the second.

        Raises:
            ValueError: `scores` is not [M, n] with this bootstrap's n, or leaves 0..1.
        """
        rows = self._rows(scores)
        if not (rows.min(initial=0) >= -_SAME and rows.max(initial=0) <= 1 + _SAME):  # nor a NaN
            got = f"{rows.min():g} to {rows.max():g}"
            fail("scores", "values from 0 to 1", got, "give shares; `differences` compares two")
        imagined = np.tile(_FIRST if arm == 1 else _SECOND, (len(rows), 1))
        return np.concatenate([rows, imagined], axis=1)

    def estimate(self, seen: Floats) -> Estimate:
        """Means and draws of M statistics, given as [M, n + 4] with the imagined images last."""
        blocks = self._made() if self._kept is None else self._kept
        draws = np.concatenate([block.astype(np.float64) @ seen.T for block in blocks])
        ends = seen[:, -_MORE:]
        return Estimate(seen[:, :-_MORE].mean(1), draws, ends.min(1), ends.max(1), self.images)

    def estimates(self, wanted: Mapping[str, Floats]) -> dict[str, Estimate]:
        """`estimate` of every named [M, n + 4], in one pass over the draws."""
        whole = self.estimate(np.concatenate(list(wanted.values())))
        found, start = {}, 0
        for name, rows in wanted.items():
            found[name] = whole[start : start + len(rows)]
            start += len(rows)
        return found

    def intervals(self, scores: ArrayLike) -> list[Interval]:
        """Mean accuracies in percent with their intervals, one for each of M rows.

        Args:
            scores: [M, n] in 0..1, per image; an average over training seeds is taken per image,
                before.

        Raises:
            ValueError: `scores` is not [M, n] with this bootstrap's n, or leaves 0..1.
        """
        return self.estimate(self.seen(scores)).intervals(self.coverage)

    def differences(self, first: ArrayLike, second: ArrayLike) -> list[Interval]:
        """Mean paired differences, first minus second, in points with their intervals.

        An image that both arms find hard enters both means of a draw with one weight, so what they
        share cancels: Var(a − b) = Var a + Var b − 2 Cov(a, b).

        Args:
            first: [M, n] in 0..1, per image.
            second: the same of the other arm.

        Raises:
            ValueError: the two are not [M, n] with this bootstrap's n, or leave 0..1.
        """
        rows = self.seen(first) - self.seen(second, arm=2)
        return self.estimate(rows).intervals(self.coverage)

    def _rows(self, scores: ArrayLike) -> Floats:
        rows = np.asarray(scores, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.images:
            got, remedy = str(list(rows.shape)), "give every arm the same images in the same order"
            fail("scores", f"[M, n] = [M, {self.images}]", got, remedy)
        return rows

    def _made(self) -> Iterator[NDArray[np.float32]]:
        """The weights, [_BLOCK/(n + 4), n + 4] at a time; each row's sum is 1."""
        step = max(1, _BLOCK // (self.images + _MORE))
        for start in range(0, self.resamples, step):
            generator = np.random.default_rng([self._seed, start])
            rows = min(step, self.resamples - start)
            block = np.empty((rows, self.images + _MORE), dtype=np.float32)
            block[:, :-_MORE] = generator.standard_exponential(
                (rows, self.images), dtype=np.float32
            )
            block[:, -_MORE:] = generator.standard_gamma(_IMAGINED, (rows, _MORE))
            block /= block.sum(1, keepdims=True)
            yield block


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over B sets of images of the same M statistics: a macro average over benchmarks.

    The imagined images draw each set's mean towards the middle. That is what the skewness of few
    images asks for, but an average of B sets is less skewed than its parts, and the pulls add up
    where the noise does not. With v_b the variance of the draws of set b, mean_b its plain mean,

        free_rb = mean_b + (1 + 1/n_b) (draw_rb − E[draw_b])        without the pull
        draw_r  = (1/B) Σ_b (ω_b draw_rb + (1 − ω_b) free_rb)       ω_b = v_b / Σ_b v_b

    Where all sets are alike, the pull that is left is that of the pooled answers, 1/B of a set's;
    where one set makes all the noise, its pull stays.

    Args:
        estimates: of independent draws: each of a `Bootstrap` with a seed of its own.

    Returns:
        An estimate of the M averages; its `images` are those of all sets.
    """
    spread = np.array([each.draws.var(0) for each in estimates])  # [B, M]
    whole = np.maximum(spread.sum(0), np.finfo(np.float64).tiny)
    mean = np.mean([each.means for each in estimates], axis=0)
    draws = np.zeros_like(estimates[0].draws)
    for each, own in zip(estimates, spread, strict=True):
        free = each.means + (1 + 1 / each.images) * (each.draws - each.draws.mean(0))
        draws += (free + own / whole * (each.draws - free)) / len(estimates)
    images = sum(each.images for each in estimates)
    return Estimate(mean, draws, estimates[0].least, estimates[0].most, images)


def macro(scores: ArrayLike) -> Floats:
    """Macro average over corruptions, per image: m_i = (1/C) Σ_c s_ci.

    Its mean over images is the mean of the C accuracies, and a bootstrap over images of m keeps the
    corruptions of one image together, as they were measured.

    Args:
        scores: [C, n] in 0..1, one row per corruption of a pool at one level.

    Returns:
        [n] in 0..1.

    Raises:
        ValueError: `scores` is not [C, n] with C ≥ 1.

    Example:
        >>> macro([[1, 0, 1], [0, 0, 1]])
        array([0.5, 0. , 1. ])
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        fail(
            "scores",
            "[C, n], one row per corruption",
            str(list(values.shape)),
            "stack the corruptions of a pool",
        )
    return values.mean(0)
