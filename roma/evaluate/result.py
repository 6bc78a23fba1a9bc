"""What an evaluation found: correctness and texts of every question at every condition."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roma.evaluate.conditions import Cell
from roma.evaluate.intervals import macro
from roma_kernels.errors import fail

Share = Literal["correct", "passed", "voted"]
"""Which of a cell's shares of right answers."""


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

    @property
    def several(self) -> bool:
        """Whether every question has several answers."""
        return all(found.passed is not None for found in self.cells.values())

    def scores(self, pool: str, level: int = 0, of: Share = "correct") -> NDArray[np.float64]:
        """Macro average over the pool's corruptions at a level, per image: [n] in 0..1.

        Raises:
            ValueError: nothing was measured there.
        """
        where = (pool, level)
        rows = [getattr(found, of) for c, found in self.cells.items() if (c.pool, c.level) == where]
        if not rows:
            fail("pool, level", "one that was measured", str(where), "add it to the cells")
        return macro(rows)

    def save(self, path: str | Path) -> None:
        """Writes JSON: ids, and per cell the shares of right answers and the texts."""
        cells = [
            asdict(cell) | {of: row.tolist() for of, row in _shares(found)} | {"texts": found.texts}
            for cell, found in self.cells.items()
        ]
        Path(path).write_text(json.dumps({"ids": self.ids, "cells": cells}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "EvalResult":
        """Reads what `save` wrote."""
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        cells = {}
        for row in stored["cells"]:
            cell = Cell(row["pool"], row["corruption"], row["level"])
            shares = {of: smallest(row[of]) for of in get_args(Share) if of in row}
            cells[cell] = CellResult(texts=row["texts"], **shares)
        return cls(stored["ids"], cells)


def smallest(values: ArrayLike) -> NDArray[Any]:
    """Shares, as uint8 where they are 0 and 1 alone."""
    shares = np.asarray(values, dtype=np.float64)
    whole = bool(np.isin(shares, (0.0, 1.0)).all())
    return shares.astype(np.uint8) if whole else shares


def _shares(found: CellResult) -> list[tuple[Share, NDArray[Any]]]:
    """Those that a cell has."""
    named = {of: getattr(found, of) for of in get_args(Share)}
    return [(of, row) for of, row in named.items() if row is not None]
