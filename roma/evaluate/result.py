"""What an evaluation found: correctness and texts per condition, accuracies with intervals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from roma.evaluate.conditions import Cell
from roma.evaluate.intervals import Bootstrap, Interval, macro
from roma_kernels.errors import fail


@dataclass(frozen=True)
class CellResult:
    """One model on one cell.

    Attributes:
        correct: [n] in 0..1, the share of right answers to each question; uint8 for one answer.
        texts: of each question the first answer; empty where they were left on disk.
        passed: [n] uint8, whether one of several answers is right; None for one answer.
        voted: [n] uint8, whether the most frequent of several answers is right; None for one.
    """

    correct: NDArray[np.uint8] | NDArray[np.float64]
    texts: list[str]
    passed: NDArray[np.uint8] | None = None
    voted: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class EvalResult:
    """One model on every cell; images in the order of `ids`."""

    ids: list[str]
    cells: dict[Cell, CellResult]

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(pool, level) of every macro average, in the order measured; ("clean", 0) for clean."""
        return list(dict.fromkeys((cell.pool, cell.level) for cell in self.cells))

    def scores(self, pool: str, level: int = 0) -> NDArray[np.float64]:
        """Macro average over the pool's corruptions at a level, per image: [n] in 0..1.

        Raises:
            ValueError: nothing was measured there.
        """
        where = (pool, level)
        rows = [found.correct for c, found in self.cells.items() if (c.pool, c.level) == where]
        if not rows:
            fail("pool, level", "one that was measured", str(where), "add it to the cells")
        return macro(rows)

    def save(self, path: str | Path) -> None:
        """Writes JSON: ids, and per cell the correctness and the texts."""
        cells = [
            asdict(cell) | {"correct": found.correct.tolist(), "texts": found.texts}
            for cell, found in self.cells.items()
        ]
        Path(path).write_text(json.dumps({"ids": self.ids, "cells": cells}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "EvalResult":
        """Reads what `save` wrote."""
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        cells = {}
        for row in stored["cells"]:
            correct = np.array(row["correct"], dtype=np.uint8)
            cell = Cell(row["pool"], row["corruption"], row["level"])
            cells[cell] = CellResult(correct, row["texts"])
        return cls(stored["ids"], cells)


def summarise(result: EvalResult, *, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Accuracies in percent with 95 % intervals over images, as JSON.

    Args:
        result: of `evaluate`.
        bootstrap: to share with other models; None for one of its own.

    Returns:
        "images": n; "pools": {"clean": entry, "seen": {"L1": entry, …}, …}, macro averages over
        corruptions; "detail": one row per cell. An entry is {"mean", "low", "high", "n"}.
    """
    bootstrap = bootstrap or Bootstrap(len(result.ids))
    macros = bootstrap.intervals([result.scores(*column) for column in result.columns])
    single = bootstrap.intervals([found.correct for found in result.cells.values()])
    return {
        "images": len(result.ids),
        "pools": tree_of(result.columns, macros),
        "detail": [
            asdict(cell) | interval.as_dict()
            for cell, interval in zip(result.cells, single, strict=True)
        ],
    }


def tree_of(columns: Sequence[tuple[str, int]], intervals: Sequence[Interval]) -> dict[str, Any]:
    """Pool → "L1", "L2", … → entry; a pool without levels ("clean") is its entry.

    Example:
        >>> tree_of([("clean", 0)], [Interval(90.0, 88.0, 92.0, 500)])
        {'clean': {'mean': 90.0, 'low': 88.0, 'high': 92.0, 'n': 500}}
    """
    tree: dict[str, Any] = {}
    for (pool, level), interval in zip(columns, intervals, strict=True):
        if level:
            tree.setdefault(pool, {})[f"L{level}"] = interval.as_dict()
        else:
            tree[pool] = interval.as_dict()
    return tree


# One cell of the table: in a line where the terminal is wide enough for it, else in two.
_BESIDE, _BELOW = "{mean:.1f} [{low:.1f}, {high:.1f}]", "{mean:.1f}\n{low:.1f}–{high:.1f}"
_COLUMNS = 80


def summary_table(summary: Mapping[str, Any]) -> Group:
    """A summary for the terminal: a row per corruption, a macro average below each pool.

    Args:
        summary: of `summarise`.
    """
    pools = dict(summary["pools"])
    # Not the table's title, which would wrap at the table's own width.
    title = f"Accuracy, % [95 % interval], {summary['images']} images"
    if clean := pools.pop("clean", None):
        title += "\nclean: " + _BESIDE.format(**clean)
    rows: list[tuple[str, list[Mapping[str, Any]]]] = []
    for pool, macros in pools.items():
        found = [row for row in summary["detail"] if row["pool"] == pool]
        for kind in dict.fromkeys(row["corruption"] for row in found):
            rows.append((kind, [row for row in found if row["corruption"] == kind]))
        rows.append((f"{pool}: mean", list(macros.values())))
    if not rows:
        return Group(Text(title))
    levels = sorted({row["level"] for row in summary["detail"]} - {0})
    widest = max(len(_BESIDE.format(**entry)) for _, entries in rows for entry in entries)
    first = max(len(name) for name, _ in rows)
    fits = 2 + first + len(levels) * (widest + 2) <= _COLUMNS  # 2: between columns, at the edges
    form = _BESIDE if fits else _BELOW
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("corruption", no_wrap=True)
    for level in levels:
        table.add_column(f"L{level}", justify="right", no_wrap=True)
    for name, entries in rows:
        mean = name.endswith(": mean")
        cells = [Text(form.format(**entry)) for entry in entries]
        table.add_row(name, *cells, style="bold" if mean else None, end_section=mean)
    return Group(Text(title), table)
