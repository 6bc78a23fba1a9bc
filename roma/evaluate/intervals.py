"""Accuracies with bootstrap intervals that are paired over images: all resample the same images.

Scores are per image, in 0..1. With w_r ~ Multinomial(n, 1/n, …, 1/n), the number of times each of
the n images enters resample r,

    mean = (1/n) Σ_i s_i    mean_r = (1/n) Σ_i w_ri s_i    interval = [q_2.5 %, q_97.5 %] of mean_r

(percentile bootstrap; Efron and Tibshirani 1993, section 13.3). One `Bootstrap` holds one matrix w,
so two arms, two corruptions or two seeds are always compared on the same draws. The interval covers
the choice of test images. It does not cover the training seeds, which a report shows one by one.

Where all n images score the same value c, every resample has the mean c, and the percentiles say
nothing about the images that were not drawn. What n equal scores do say is how common other scores
can be: with confidence 1 − α, at least the share

    p = (α/2)^(1/n)

of all images scores c, the Clopper-Pearson bound of n hits in n draws (Clopper and Pearson 1934,
Biometrika 26, 404-413). The rest may score anything from `least` to `most`, so

    interval = [p·c + (1 − p)·least, p·c + (1 − p)·most]

Accuracies lie in 0..1: none right of n gives [0, 1 − p], all right [p, 1], which are the
Clopper-Pearson intervals of 0 and n hits. Paired differences lie in −1..1: two arms that agree on
all n images give ±(1 − p), 9 points for n = 40 and 0.7 for n = 500, not "no difference".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roma_kernels.errors import fail

_BLOCK = 1000  # resamples turned to float64 at a time: 4 MB for 500 images
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


class Bootstrap:
    """Resamplings of `images` images, drawn once and shared by every statistic.

    Args:
        images: n, the number of test images, ≥ 1.
        resamples: R; the Monte-Carlo error of an interval's end falls as 1/√R.
        seed: of a local generator; the same seed gives the same intervals, bit for bit.
        coverage: of the interval, in (0, 1).

    Raises:
        ValueError: no images, no resamples, or a coverage outside (0, 1).

    Example:
        >>> Bootstrap(4).intervals([[1, 1, 0, 1]])
        [Interval(mean=75.0, low=25.0, high=100.0, n=4)]
        >>> Bootstrap(2).intervals([[0, 0]])[0].as_dict()
        {'mean': 0.0, 'low': 0.0, 'high': 84.189, 'n': 2}
    """

    def __init__(
        self, images: int, *, resamples: int = 10_000, seed: int = 0, coverage: float = 0.95
    ) -> None:
        """Draws the resamplings."""
        if images < 1:
            fail("images", "at least 1", str(images), "evaluate on a split that is not empty")
        if resamples < 1:
            fail("resamples", "at least 1", str(resamples), "10000 is customary")
        if not 0 < coverage < 1:
            fail("coverage", "a number between 0 and 1", repr(coverage), "0.95 is customary")
        self.images, self.coverage = images, coverage
        generator = np.random.default_rng(seed)
        # uint8 holds every count: of more than 255 images, one is drawn 256 times with p < 1e-500.
        self._counts = np.empty((resamples, images), dtype=np.uint8)
        for start in range(0, resamples, _BLOCK):
            rows = min(_BLOCK, resamples - start)
            drawn = (
                generator.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
            )
            counts = np.bincount(drawn.ravel(), minlength=rows * images)
            self._counts[start : start + rows] = counts.reshape(rows, images)

    def means(self, scores: ArrayLike) -> NDArray[np.float64]:
        """The mean of each resample, for M statistics at once: mean_rm = (1/n) Σ_i w_ri s_mi.

        Args:
            scores: [M, n], in any unit.

        Returns:
            [R, M] in the unit of `scores`.

        Raises:
            ValueError: `scores` is not [M, n] with this bootstrap's n.
        """
        rows = np.asarray(scores, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.images:
            got, remedy = str(list(rows.shape)), "give every arm the same images in the same order"
            fail("scores", f"[M, n] = [M, {self.images}]", got, remedy)
        blocks = (self._counts[i : i + _BLOCK] for i in range(0, len(self._counts), _BLOCK))
        return np.concatenate([block.astype(np.float64) @ rows.T for block in blocks]) / self.images

    def intervals(self, scores: ArrayLike) -> list[Interval]:
        """Mean accuracies in percent with their intervals, one for each of M rows.

        Args:
            scores: [M, n] in 0..1, per image; an average over training seeds is taken per image,
                before.

        Raises:
            ValueError: `scores` is not [M, n] with this bootstrap's n, or leaves 0..1.
        """
        return self._intervals(scores, least=0.0)

    def differences(self, first: ArrayLike, second: ArrayLike) -> list[Interval]:
        """Mean paired differences, first minus second, in points with their intervals.

        An image that both arms find hard enters both means of a resample, so what they share
        cancels: Var(a − b) = Var a + Var b − 2 Cov(a, b).

        Args:
            first: [M, n] in 0..1, per image.
            second: the same of the other arm.

        Raises:
            ValueError: the two are not [M, n] with this bootstrap's n, or leave 0..1.
        """
        rows = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        return self._intervals(rows, least=-1.0)

    def _intervals(self, scores: ArrayLike, *, least: float) -> list[Interval]:
        """Means of rows in least..1, ×100, with their intervals."""
        means, tail = self.means(scores), 50 * (1 - self.coverage)
        rows = np.asarray(scores, dtype=np.float64)
        if rows.min() < least - _SAME or rows.max() > 1 + _SAME:
            got = f"{rows.min():g} to {rows.max():g}"
            remedy = "give shares; two arms are compared by `differences`"
            fail("scores", f"values from {least:g} to 1", got, remedy)
        ends = np.percentile(means, [tail, 100 - tail], axis=0)
        middle = rows.mean(1)
        equal = np.ptp(rows, axis=1) < _SAME
        share = (tail / 100) ** (1 / self.images)
        for end, limit in zip(ends, (least, 1.0), strict=True):
            end[equal] = share * middle[equal] + (1 - share) * limit
        found = zip((100 * middle).tolist(), *(100 * ends).tolist(), strict=True)
        return [Interval(mean, low, high, self.images) for mean, low, high in found]


def macro(scores: ArrayLike) -> NDArray[np.float64]:
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
