"""report.csv: every number of a report's tables, one a row."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.report.costs import trained
from roma.evaluate.columns import columns_of

FIELDS = ("kind", "arm", "against", "seed", "column", "mean", "low", "high")


def rows_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per number of the accuracies, the differences and the costs.

    Args:
        report: of `experiments.report.report.build_report`.

    Returns:
        Rows with the keys `FIELDS`. kind: "accuracy", % of an arm; "difference", points, arm minus
        `against`; "cost", what training an arm took; "time", what a stage took. seed: "mean" over
        seeds, or one. column: "clean", "seen L3", …; of a cost "steps" or "cpu_s", seconds of one
        core; of a time the stage, in seconds. low and high: ends of the 95 % interval; of a cost
        the least and greatest over seeds.

    Example:
        >>> entry = {"mean": 90.0, "low": 88.1, "high": 91.5, "n": 500}
        >>> report = {"arms": {"roma": {"clean": entry}}, "per_seed": {}, "differences": {}}
        >>> [list(row.values()) for row in rows_of(report | {"timings": {}})]
        [['accuracy', 'roma', '', 'mean', 'clean', 90.0, 88.1, 91.5]]
    """
    return [dict(zip(FIELDS, row, strict=True)) for row in _rows(report)]


def csv_of(report: Mapping[str, Any]) -> str:
    """`rows_of` as the text of a CSV file with a heading."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(report))
    return text.getvalue()


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for arm, tree in report["arms"].items():
        for seed, own in {"mean": tree, **report["per_seed"].get(arm, {})}.items():
            yield from _entries(("accuracy", arm, "", seed), own)
    for name, by_seed in report["differences"].items():
        arm, _, against = name.partition("-")
        for seed, own in by_seed.items():
            yield from _entries(("difference", arm, against, seed), own)
    runs = [run for run in trained(report["timings"].get("runs", {})) if run[0] in report["arms"]]
    for arm in dict.fromkeys(run[0] for run in runs):
        own = [(seed, steps, cpu_s) for name, seed, steps, cpu_s in runs if name == arm]
        for column, place in (("steps", 1), ("cpu_s", 2)):
            values = {run[0]: run[place] for run in own}
            mean = round(sum(values.values()) / len(values), 3)
            ends = min(values.values()), max(values.values())
            yield ("cost", arm, "", "mean", column, mean, *ends)
            for seed, value in values.items():
                yield ("cost", arm, "", str(seed), column, value, value, value)

    for stage, seconds in report["timings"].items():
        if isinstance(seconds, int | float):
            yield ("time", "", "", "mean", stage, seconds, seconds, seconds)


def _entries(first: tuple[str, ...], tree: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for column, entry in columns_of(tree).items():
        yield (*first, column, entry["mean"], entry["low"], entry["high"])
