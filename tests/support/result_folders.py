"""Folders of results, as the commands leave them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roma.evaluate.conditions import Cell
from roma.evaluate.record import Record, Row

CLEAN, BLUR = Cell(), Cell("seen", "gaussian_blur", 1)


def write_eval(
    folder: Path,
    *,
    finished: bool = True,
    right: Mapping[Cell, Sequence[int]] | None = None,
    ids: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of `roma eval`: of two questions, clean and blurred, unless `right` says more."""
    asked = {"model": "m", "data": "data/digits@test", "seed": 0} | dict(settings or {})
    record = Record(folder, asked)
    for cell, row in (right or {CLEAN: (1, 0), BLUR: (1, 0)}).items():
        names = ids or [f"q{i}" for i in range(len(row))]
        record.add([Row(id, cell, ("said",), (int(r),)) for id, r in zip(names, row, strict=True)])
    if finished:
        (folder / "eval.json").write_text("{}", encoding="utf-8")
    return folder


def write_bench(
    folder: Path, names: Sequence[str] = ("mmstar", "ai2d"), *, finished: bool = True
) -> Path:
    """A folder of `roma bench-vlm`: of 3, 4, … questions on clean images."""
    settings = {"seed": 0, "benchmarks": {name: {} for name in names}}
    Record(folder, settings)
    for turn, name in enumerate(names):
        answers = Record(folder / name, settings)
        answers.add([Row(str(i), CLEAN, ("said",), (i % 2,)) for i in range(3 + turn)])
    if finished:
        (folder / "bench.json").write_text("{}", encoding="utf-8")
    return folder
