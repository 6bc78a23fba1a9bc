"""How often the 95 % intervals of `roma.evaluate.intervals` hold the truth, on made-up answers.

    python -m experiments.coverage          the table of docs/EVALUATION.md; 15 seconds
    python -m experiments.coverage seeds    intervals over seeds and images; a minute

An answer is right or wrong, so that no fixed rule covers every single accuracy equally: at n = 5
and an accuracy of 0.9, any gives 92 or 99 %. Coverage here is therefore an average over truths: of
an accuracy, evenly spread over 0..1; of two arms, tables (both right, first alone, second alone,
both wrong) from a Dirichlet distribution. Given counts x, a truth from Dirichlet(a) has the law
Dirichlet(a + x), so that coverage is the truth's probability to lie in the interval of x: no
answers are drawn (`single`), or few (`paired`).
"""

import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc
from scipy.stats import binom

from experiments.report.hierarchy import Hierarchy
from roma.evaluate.intervals import Bootstrap, Interval, average, macro

Rule = Callable[[NDArray[np.float64]], Sequence[Interval]]
"""Scores [M, n] to their intervals."""

FLAT = (1.0, 1.0, 1.0, 1.0)
"""Every table of two arms is as likely as any other."""
TOGETHER = (3.0, 0.5, 0.5, 3.0)
"""Two arms that agree on six of seven images."""

_SETS = 1000  # made-up sets of answers, at a time


def single(n: int, rule: Rule | None = None) -> float:
    """Coverage of an accuracy that is evenly spread over 0..1; exact but for the rule's own draws.

    Σ_k P(k) P(low_k ≤ p ≤ high_k | k), where P(k) = 1/(n + 1) and p given k is Beta(k+1, n−k+1).

    Args:
        n: images.
        rule: None: `Bootstrap.intervals`.
    """
    low, high = _of_counts(n, rule)
    k = np.arange(n + 1)
    return float(np.mean(betainc(k + 1, n - k + 1, high) - betainc(k + 1, n - k + 1, low)))


def single_at(n: int, truths: Sequence[float], rule: Rule | None = None) -> list[float]:
    """Coverage of fixed accuracies; exact but for the rule's own draws."""
    low, high = _of_counts(n, rule)
    k = np.arange(n + 1)
    return [float(binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum()) for p in truths]


def _of_counts(n: int, rule: Rule | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The intervals of 0 to n right answers, as shares."""
    scores = (np.arange(n) < np.arange(n + 1)[:, None]).astype(float)
    found = (rule or Bootstrap(n).intervals)(scores)
    return np.array([each.low for each in found]) / 100, np.array([e.high for e in found]) / 100


def paired(n: int, prior: Sequence[float], *, seed: int = 0, sets: int = 200) -> dict[str, float]:
    """Coverage of what compares two arms: difference, relative, corrective, destructive.

    Args:
        n: images.
        prior: Dirichlet parameters of (both right, first alone, second alone, both wrong).
        seed: of the simulation.
        sets: tables of counts; each is integrated over 1,000 truths.
    """
    generator, bootstrap = np.random.default_rng(seed), Bootstrap(n, resamples=5000)
    counts = np.array([generator.multinomial(n, p) for p in generator.dirichlet(prior, sets)])
    ends = counts.cumsum(1)[:, :, None]  # images are sorted: both, first, second, neither
    place = np.arange(n)
    first = (place < ends[:, 1]).astype(float)
    second = ((place < ends[:, 0]) | ((place >= ends[:, 1]) & (place < ends[:, 2]))).astype(float)
    one, other = bootstrap.seen(first), bootstrap.seen(second, arm=2)
    found = bootstrap.estimates(
        {
            "difference": one - other,
            "corrective": (1 - one) * other,
            "destructive": one * (1 - other),
            "first": one,
            "second": other,
        }
    )
    intervals = {name: each.intervals() for name, each in found.items()}
    intervals["relative"] = found["second"].over(found["first"]).intervals()
    truths = generator.standard_gamma(np.add(prior, counts)[:, None], (sets, 1000, 4))
    both, alone, lost, _ = np.moveaxis(truths / truths.sum(-1, keepdims=True), -1, 0)
    truth = {
        "difference": alone - lost,
        "relative": (both + lost) / (both + alone),
        "corrective": lost,
        "destructive": alone,
    }
    right = counts[:, :2].sum(1) > 0  # else there is no relative robustness
    return {
        name: float(_inside(values, intervals[name])[right if name == "relative" else ...].mean())
        for name, values in truth.items()
    }


def independent(n: int, *, seed: int = 0, sets: int = _SETS) -> float:
    """Coverage of the difference of two independent arms, each accuracy evenly spread over 0..1."""
    generator = np.random.default_rng(seed)
    truth = generator.random((2, sets, 1))
    first, second = (generator.random((2, sets, n)) < truth).astype(float)
    found = Bootstrap(n).differences(first, second)
    return float(_inside((truth[0] - truth[1])[:, :1], found).mean())


def drops(n: int, *, seed: int = 0, sets: int = _SETS) -> float:
    """Coverage of the difference of two models' drops; any table of four answers is as likely.

    Args:
        n: images.
        seed: of the simulation.
        sets: simulated sets of answers: first clean, first degraded, second clean, second degraded.
    """
    generator, bootstrap = np.random.default_rng(seed), Bootstrap(n, resamples=5000)
    kinds = np.array(list(product((0.0, 1.0), repeat=4)))  # [16, 4]
    tables = generator.dirichlet(np.ones(16), sets)
    counts = [generator.multinomial(n, table) for table in tables]
    answers = np.array([np.repeat(kinds, count, axis=0) for count in counts])  # [sets, n, 4]
    arms: tuple[Literal[1, 2], ...] = (1, 2, 2, 1)
    one, less, other, more = (
        bootstrap.seen(answers[:, :, i], arm=arm) for i, arm in enumerate(arms)
    )
    found = bootstrap.estimate((one - less) - (other - more)).intervals()
    truth = tables @ (kinds @ [1, -1, -1, 1])
    return float(_inside(truth[:, None], found).mean())


def averaged(
    n: int, *, spread: float, corruptions: int = 4, seed: int = 0, sets: int = _SETS
) -> float:
    """Coverage of a macro average over corruptions; images differ in difficulty.

    Args:
        n: images.
        spread: an image of mean accuracy m is right with a chance from Beta(m·s, (1 − m)·s), where
            s = 1/spread − 1: near 0 all images are alike, near 1 each is always right or wrong.
        corruptions: of the pool.
        seed: of the simulation.
        sets: simulated sets of answers; m is evenly spread over 0..1.
    """
    generator = np.random.default_rng(seed)
    truth, size = generator.random((sets, 1)), 1 / spread - 1
    chance = generator.beta(size * truth, size * (1 - truth), (sets, n))
    scores = macro((generator.random((corruptions, sets, n)) < chance).reshape(corruptions, -1))
    return float(_inside(truth, Bootstrap(n).intervals(scores.reshape(sets, n))).mean())


def benchmarks(
    sizes: Sequence[int], truth: float | None, *, seed: int = 0, sets: int = 500
) -> float:
    """Coverage of the average accuracy of several benchmarks.

    Args:
        sizes: images of each.
        truth: the accuracy on all of them; None: evenly spread over 0..1, on each for itself.
        seed: of the simulation.
        sets: simulated sets of answers.
    """
    generator, parts = np.random.default_rng(seed), []
    truths = np.full((len(sizes), sets, 1), truth or 0.0)
    if truth is None:
        truths = generator.random(truths.shape)
    for turn, n in enumerate(sizes):
        bootstrap = Bootstrap(n, seed=turn, resamples=4000)
        scores = (generator.random((sets, n)) < truths[turn]).astype(float)
        parts.append(bootstrap.estimate(bootstrap.seen(scores)))
    return float(_inside(truths.mean(0), average(parts).intervals()).mean())


def over_seeds(
    seeds: int, spread: float, *, images: int = 500, seed: int = 0, sets: int = 400
) -> dict[str, float]:
    """Coverage of the difference of two arms, each trained with several seeds.

    An answer of seed s to image i is right with a chance of m + a_s + b_i + c_si: m is 0.70 or
    0.66, a_s normal, b_i (±0.25) is the images' own and partly (±0.08) the arm's on them, c_si
    (±0.1) what the two do together; the score is a mean over four corruptions.

    Args:
        seeds: of each arm.
        spread: standard deviation of a_s.
        images: of the test.
        seed: of the simulation.
        sets: simulated experiments.

    Returns:
        "hierarchy": of `experiments.report.hierarchy`; "two levels": percentiles of a bootstrap
        that resamples seeds and weighs images; "images": of `Bootstrap` on the means over seeds.
    """
    generator = np.random.default_rng(seed)
    ours, plain = Hierarchy(images, resamples=1000), Bootstrap(images, resamples=1000)
    held = dict.fromkeys(("hierarchy", "two levels", "images"), 0)
    for _ in range(sets):
        shared = generator.uniform(-0.25, 0.25, images)
        own = generator.uniform(-0.08, 0.08, images)
        arms = []
        for mean, also in ((0.70, own), (0.66, 0 * own)):
            chance = mean + generator.normal(0, spread, (seeds, 1)) + shared + also
            chance = chance + generator.uniform(-0.1, 0.1, (seeds, images))
            arms.append((generator.random((4, seeds, images)) < chance).mean(0)[:, None])
        found = {
            "hierarchy": ours.differences(*arms)[0],
            "two levels": _two_levels((arms[0] - arms[1])[:, 0], generator),
            "images": plain.differences(*(arm.mean(0) for arm in arms))[0],
        }
        for name, each in found.items():
            held[name] += each.low <= 4 <= each.high
    return {name: count / sets for name, count in held.items()}


def _two_levels(differences: NDArray[np.float64], generator: np.random.Generator) -> Interval:
    """Seeds resampled with replacement, images weighed: percentiles, [S, n] in points."""
    seeds, images = differences.shape
    weights = generator.dirichlet(np.ones(images), 1000)
    counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), 1000) / seeds
    draws = 100 * np.einsum("rs,sr->r", counts, differences @ weights.T)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(100 * float(differences.mean()), float(low), float(high), images)


SEEDS, SPREADS = (3, 5), (0.0, 0.005, 0.01, 0.02)
"""Experiments that `over_seeds` is asked about: seeds of an arm, and their spread."""


def seeds_table() -> str:
    """Coverage of intervals over seeds and images, in percent."""
    names = ("hierarchy", "two levels", "images")
    lines = [f"| seeds | spread of seeds, points | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for count, spread in product(SEEDS, SPREADS):
        found = over_seeds(count, spread)
        shown = " | ".join(_percent(found[name]) for name in names)
        lines.append(f"| {count} | {100 * spread:g} | {shown} |")
    return "\n".join(lines)


def _inside(values: NDArray[np.float64], found: Sequence[Interval]) -> NDArray[np.bool_]:
    """[M, T]: whether each of T truths of M statistics lies in the statistic's interval."""
    low, high = (np.array([[getattr(e, end)] for e in found]) / 100 for end in ("low", "high"))
    return (low <= values) & (values <= high)


def table() -> str:
    """The table of docs/EVALUATION.md, in percent."""
    fixed = [0.05 + 0.005 * step for step in range(181)]
    sizes, mixed = (5, 50, 500), (5, 10, 30, 50, 100, 300, 500)
    rows: list[tuple[str, list[str]]] = [
        ("accuracy", [_percent(single(n)) for n in sizes]),
        (
            "accuracy, the worst and best of 0.05 … 0.95",
            [_range(single_at(n, fixed)) for n in sizes],
        ),
        ("difference of independent arms", [_percent(independent(n)) for n in sizes]),
    ]
    for name, prior in (("any table", FLAT), ("arms that agree on 6 of 7", TOGETHER)):
        found = [paired(n, prior) for n in sizes]
        rows += [
            (f"{column}, {name}", [_percent(each[column]) for each in found]) for column in found[0]
        ]
    rows.append(("difference of two drops, any table", [_percent(drops(n)) for n in sizes]))
    for spread in (0.05, 0.3, 0.7):
        shown = [_percent(averaged(n, spread=spread)) for n in sizes]
        rows.append((f"macro average over 4, spread {spread}", shown))
    for truth, said in ((None, ""), (0.9, ", all at 0.9")):
        shown = [_percent(benchmarks([n] * 7, truth)) for n in sizes]
        rows.append((f"average of 7 benchmarks{said}", shown))
    rows.append((f"average of 7 of n = {mixed}", [_percent(benchmarks(mixed, None)), "", ""]))
    lines = ["| 95 % interval of | n = 5 | n = 50 | n = 500 |", "|---|--:|--:|--:|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(shown)} |" for name, shown in rows])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _range(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.1f}–{100 * max(shares):.1f}"


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["seeds"]):
        sys.exit("python -m experiments.coverage [seeds]")
    print(seeds_table() if sys.argv[1:] else table())
