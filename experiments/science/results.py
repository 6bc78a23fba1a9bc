"""The committed numbers: CSV files that docs/SCIENCE.md and docs/DEMO.md are written from."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.report.rows import FIELDS
from roma_kernels.errors import fail

FOLDER = Path(__file__).parent / "results"


def over_seeds(
    kind: str, arm: str, column: str, by_seed: Mapping[int, float]
) -> Iterator[dict[str, Any]]:
    """Rows of a number that each run has: its mean with the least and greatest, then each.

    Example:
        >>> rows = list(over_seeds("training", "roma", "reward", {0: 80.0, 1: 82.0}))
        >>> rows[0]["seed"], rows[0]["mean"], rows[0]["low"], rows[0]["high"], rows[2]["mean"]
        ('mean', 81.0, 80.0, 82.0, 82.0)
    """
    values = {seed: round(value, 3) for seed, value in by_seed.items()}
    mean = round(sum(by_seed.values()) / len(by_seed), 3)
    first = (kind, arm, "")
    ends = min(values.values()), max(values.values())
    yield dict(zip(FIELDS, (*first, "mean", column, mean, *ends), strict=True))
    for seed, value in values.items():
        own = (*first, str(seed), column, value, value, value)
        yield dict(zip(FIELDS, own, strict=True))


def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes the file of a study and split, and returns its path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


class Table:
    """A CSV file, by kind, arm, what it is compared with, column and seed.

    Args:
        name: of the file, without its ending.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, name: str) -> None:
        """Reads it."""
        path = FOLDER / f"{name}.csv"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.csv")))
            fail("results", f"one of {known}", repr(name), "run make science")
        self.name = name
        self._rows: dict[tuple[str, ...], dict[str, float]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                key = tuple(row[field] for field in FIELDS[:5])
                numbers = {end: float(row[end]) for end in ("mean", "low", "high")}
                self._rows[key] = numbers

    def entry(
        self, kind: str, arm: str, column: str, *, against: str = "", seed: str = "mean"
    ) -> dict[str, float]:
        """{"mean", "low", "high"} of a row.

        Raises:
            ValueError: the file has no such row.
        """
        key = (kind, arm, against, seed, column)
        if key not in self._rows:
            fail(f"{self.name}.csv", "a row of it", str(key), "correct the name")
        return self._rows[key]

    def seeds(self, kind: str, arm: str, column: str, *, against: str = "") -> list[float]:
        """The numbers of the single seeds, in their order."""
        wanted = (kind, arm, against, column)
        return [
            found["mean"]
            for (own, name, other, seed, where), found in self._rows.items()
            if (own, name, other, where) == wanted and seed != "mean"
        ]

    def column(self, kind: str) -> dict[str, float]:
        """Column → number, of every row of a kind that has no arm.

        Raises:
            ValueError: the file has none.
        """
        found = {
            where: each["mean"]
            for (own, arm, _, _, where), each in self._rows.items()
            if own == kind and not arm
        }
        if not found:
            fail(f"{self.name}.csv", f"rows of kind {kind}", "none", "correct the name")
        return found
