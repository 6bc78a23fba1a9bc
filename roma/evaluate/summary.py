"""What an evaluation says: accuracy, drop, relative robustness and flips, with paired intervals.

With c_i the share of right answers to question i on the clean image and d_i on the degraded one
(1 or 0 for one answer), over n questions:

    accuracy     (1/n) Σ d_i                     %
    drop         (1/n) Σ (c_i − d_i)             points; destructive − corrective
    relative     Σ d_i / Σ c_i                   %; none where every clean answer is wrong
    corrective   (1/n) Σ (1 − c_i) d_i           % of questions: wrong clean, right degraded
    destructive  (1/n) Σ c_i (1 − d_i)           % of questions: right clean, wrong degraded

and of several answers to a question: pass, any of them is right, and majority, the most frequent
one is. Of a pool at a level, d_i is the mean over its corruptions. docs/EVALUATION.md has the
sources and the form of the JSON.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from roma.evaluate.conditions import Cell
from roma.evaluate.intervals import Bootstrap, Estimate, Floats, Interval, average
from roma.evaluate.result import EvalResult, Share
from roma_kernels.errors import fail

ROBUSTNESS = ("drop", "relative", "corrective", "destructive")
"""Columns that compare a degraded condition with the clean one."""
SEVERAL = ("pass", "majority")
"""Columns of several answers to a question."""

Entry = dict[str, float | int] | None
"""{"mean", "low", "high", "n"}; None where a column has no value."""


@dataclass(frozen=True)
class Measured:
    """One or more benchmarks, every condition and column: what the JSON is made of.

    Attributes:
        columns: (pool, level) of the macro averages.
        cells: the single conditions.
        estimates: column name → statistics of `columns`, then of `cells`; "relative" is not among
            them, it is the ratio of "accuracy" and "clean".
        coverage: of the intervals.
    """

    columns: Sequence[tuple[str, int]]
    cells: Sequence[Cell]
    estimates: Mapping[str, Estimate]
    coverage: float

    @property
    def images(self) -> int:
        """Questions, of all benchmarks."""
        return self.estimates["accuracy"].images

    def entries(self) -> dict[str, list[Entry]]:
        """Column name → its entries."""
        found: dict[str, list[Entry]] = {
            name: [each.as_dict() for each in estimate.intervals(self.coverage)]
            for name, estimate in self.estimates.items()
        }
        if "clean" in found:
            del found["clean"]
            right = self.estimates["clean"].means > 0
            ratios = self.estimates["accuracy"].over(self.estimates["clean"])
            found["relative"] = [
                each.as_dict() if some else None
                for each, some in zip(ratios.intervals(self.coverage), right, strict=True)
            ]
        return found


def summarise(result: EvalResult, *, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Every column of one benchmark with 95 % intervals over images, as JSON.

    Args:
        result: of `evaluate`, or `read_result`.
        bootstrap: to share with other models; None for one of its own.

    Returns:
        "images": n; "pools": {"clean": entry, "seen": {"L1": entry, …}, …}, accuracies, macro
        averages over corruptions; "robustness", with a clean cell alone: {"seen": {"L1": {"drop":
        entry, "relative": …, "corrective": …, "destructive": …}, …}, …}; "several", with several
        answers alone: {"clean": {"pass": entry, "majority": entry}, "seen": {"L1": …}, …};
        "detail": one row per cell, with the keys of all of these. An entry is {"mean", "low",
        "high", "n"}; None is a relative robustness without a right clean answer.
    """
    return as_json(measure(result, bootstrap or Bootstrap(len(result.ids))))


def summarise_suite(benchmarks: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Every column of several benchmarks, and of their macro average.

    Args:
        benchmarks: name → result. The average is taken over the conditions that all have.

    Returns:
        "benchmarks": name → `summarise`'s; "average": the same form, "images" those of all; not
        there for one benchmark, nor where the benchmarks share no condition.

    Raises:
        ValueError: no benchmark.
    """
    if not benchmarks:
        fail("benchmarks", "at least one", "none", "name a folder with results")
    measured = {
        # Benchmarks have other images, so their draws are independent: seeds of their own.
        name: measure(result, Bootstrap(len(result.ids), seed=seed))
        for seed, (name, result) in enumerate(benchmarks.items())
    }
    found: dict[str, Any] = {"benchmarks": {n: as_json(each) for n, each in measured.items()}}
    if len(measured) > 1 and (whole := average_of(list(measured.values()))):
        found["average"] = as_json(whole)
    return found


def measure(result: EvalResult, bootstrap: Bootstrap) -> Measured:
    """Every column of one benchmark, with its draws."""
    columns, cells = result.columns, list(result.cells)

    def rows(of: Share = "correct") -> list[Any]:
        """[columns + cells, n]."""
        single = [getattr(found, of) for found in result.cells.values()]
        return [*(result.scores(*column, of) for column in columns), *single]

    degraded = bootstrap.seen(rows(), arm=2)
    wanted: dict[str, Floats] = {"accuracy": degraded}
    if Cell() in result.cells:
        clean = bootstrap.seen(result.cells[Cell()].correct[None])
        wanted |= {
            "drop": clean - degraded,
            "corrective": (1 - clean) * degraded,
            "destructive": clean * (1 - degraded),
            "clean": np.broadcast_to(clean, degraded.shape),
        }
    if result.several:
        wanted |= {
            "pass": bootstrap.seen(rows("passed")),
            "majority": bootstrap.seen(rows("voted")),
        }
    return Measured(columns, cells, bootstrap.estimates(wanted), bootstrap.coverage)


def average_of(measured: Sequence[Measured]) -> Measured | None:
    """The macro average over benchmarks of what all of them have; None where that is nothing."""
    first = measured[0]
    columns = [each for each in first.columns if all(each in one.columns for one in measured)]
    cells = [each for each in first.cells if all(each in one.cells for one in measured)]
    names = [each for each in first.estimates if all(each in one.estimates for one in measured)]
    if not columns:
        return None

    def part(one: Measured, name: str) -> Estimate:
        at = [one.columns.index(each) for each in columns]
        at += [len(one.columns) + one.cells.index(each) for each in cells]
        return one.estimates[name][at]

    averages = {name: average([part(one, name) for one in measured]) for name in names}
    return Measured(columns, cells, averages, first.coverage)


def tree_of(columns: Sequence[tuple[str, int]], entries: Sequence[Any]) -> dict[str, Any]:
    """Pool → "L1", "L2", … → entry; a pool without levels ("clean") is its entry.

    Example:
        >>> tree_of([("clean", 0)], [Interval(90.0, 88.0, 92.0, 500)])
        {'clean': {'mean': 90.0, 'low': 88.0, 'high': 92.0, 'n': 500}}
    """
    tree: dict[str, Any] = {}
    for (pool, level), entry in zip(columns, entries, strict=True):
        shown = entry.as_dict() if isinstance(entry, Interval) else entry
        if level:
            tree.setdefault(pool, {})[f"L{level}"] = shown
        else:
            tree[pool] = shown
    return tree


def as_json(measured: Measured) -> dict[str, Any]:
    """The columns that were measured, as `summarise` describes them."""
    found, columns = measured.entries(), measured.columns
    robust = [name for name in ROBUSTNESS if name in found]
    several = [name for name in SEVERAL if name in found]
    degraded = [i for i, (_, level) in enumerate(columns) if level]
    summary: dict[str, Any] = {
        "images": measured.images,
        "pools": tree_of(columns, found["accuracy"][: len(columns)]),
    }
    if robust and degraded:
        of = [{name: found[name][i] for name in robust} for i in degraded]
        summary["robustness"] = tree_of([columns[i] for i in degraded], of)
    if several:
        of = [{name: found[name][i] for name in several} for i in range(len(columns))]
        summary["several"] = tree_of(columns, of)
    return summary | {"detail": list(_rows(measured, found, robust, several))}


def _rows(
    measured: Measured,
    found: Mapping[str, Sequence[Entry]],
    robust: Sequence[str],
    several: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row per cell: where it is, its accuracy, and the other columns."""
    for i, cell in enumerate(measured.cells, len(measured.columns)):
        names = [*(robust if cell.level else ()), *several]
        accuracy = found["accuracy"][i] or {}
        yield asdict(cell) | accuracy | {name: found[name][i] for name in names}
