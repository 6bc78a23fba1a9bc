"""Two models on the same images: paired differences, first minus second; `roma eval --compare`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import Results, load_results
from roma.evaluate.intervals import Bootstrap, Floats
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import Measured, average_of, tree_of
from roma_kernels.errors import fail

_ALIKE = ("data", "seed", "level_table")
"""Settings that decide which images the models saw."""


def compare(first: Results, second: Results) -> dict[str, Any]:
    """Paired differences of two models, first minus second, in points with 95 % intervals.

    Args:
        first: a model's results.
        second: another's, on the same questions. What only one of the two has, a benchmark or a
            condition, is named in the result and left out.

    Returns:
        "first", "second": their names; "benchmarks": name → {"images"; "pools" and "detail": as
        `summarise`'s, with differences of accuracy; "robustness": with clean cells alone, pool →
        level → {"drop": entry}}; "average": the same of the macro average over benchmarks, where
        there are several; "left_out": what only one of the two has, in words.

    Raises:
        ValueError: the two share no benchmark or no condition, or were measured on other
            questions or other images.
    """
    _check_settings(first, second)
    shared = [name for name in first.benchmarks if name in second.benchmarks]
    if not shared:
        said = [", ".join(each.benchmarks) for each in (first, second)]
        got = f"{said[0]} in {first.name} and {said[1]} in {second.name}"
        fail("results", "a benchmark that both have", got, "compare runs over the same data")
    left_out = [
        f"benchmark {name}: {one.name} alone"
        for one, other in ((first, second), (second, first))
        for name in one.benchmarks
        if name not in other.benchmarks
    ]
    measured: dict[str, Measured] = {}
    for seed, name in enumerate(shared):
        pair = first.benchmarks[name], second.benchmarks[name]
        at = f"{name}, {first.name} and {second.name}" if len(shared) > 1 else name
        one, other = pair[0], _aligned(*pair, at)
        cells = [cell for cell in one.cells if cell in other.cells]
        for result, whose in ((one, first.name), (other, second.name)):
            alone = [str(cell) for cell in result.cells if cell not in cells]
            left_out += [f"{name}: {', '.join(alone)}: {whose} alone"] if alone else []
        if not cells:
            fail(f"results of {at}", "a condition that both have", "none", "evaluate the same ones")
        columns = _columns(one, other, cells)
        measured[name] = _differences(
            one, other, cells, columns, Bootstrap(len(one.ids), seed=seed)
        )
    found: dict[str, Any] = {
        "first": first.name,
        "second": second.name,
        "benchmarks": {name: _as_json(each) for name, each in measured.items()},
    }
    if len(measured) > 1 and (whole := average_of(list(measured.values()))):
        found["average"] = _as_json(whole)
    return found | {"left_out": left_out}


def run_compare(
    first: str | Path,
    second: str | Path,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """`roma eval --compare A B`: prints the table of differences; with `out`, keeps it as JSON.

    Args:
        first: a folder of results.
        second: another, on the same questions.
        out: a .json file to write; None: none.
        console: where to print.

    Returns:
        `compare`'s.

    Raises:
        ValueError: see `compare` and `load_results`, or `out` is not named .json.
        FileNotFoundError: see `load_results`.
    """
    from roma.evaluate.tables import comparison_table

    if out is not None and Path(out).suffix != ".json":
        fail("--out", "a .json file with --compare", str(out), "name one")
    one, other = load_results(first), load_results(second)
    names = _names(Path(first), Path(second))
    found = compare(replace(one, name=names[0]), replace(other, name=names[1]))
    console = console or Console()
    console.print(comparison_table(found))
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        Path(out).write_text(text + "\n", encoding="utf-8")
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
    return found


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names; where they agree, as they were given."""
    one, other = first.resolve().name, second.resolve().name
    return (one, other) if one != other else (str(first), str(second))


def _check_settings(first: Results, second: Results) -> None:
    for key in _ALIKE:
        one, other = first.settings.get(key), second.settings.get(key)
        if one != other:
            got = f"{one!r} in {first.name} and {other!r} in {second.name}"
            fail(f"{key} of the results", "the same", got, "evaluate both on the same images")


def _aligned(first: EvalResult, second: EvalResult, where: str) -> EvalResult:
    """The second result with its questions in the order of the first's."""
    if first.ids == second.ids:
        return second
    place = {id: i for i, id in enumerate(second.ids)}
    alone = [id for id in first.ids if id not in place]
    alone += [id for id in second.ids if id not in set(first.ids)]
    if alone:
        counts = f"{len(first.ids)} and {len(second.ids)}"
        got = f"{counts}, of which one alone has {len(alone)}, the first {alone[0]!r}"
        fail(f"questions of {where}", "the same", got, "evaluate both on the same data and limit")
    order = [place[id] for id in first.ids]

    def sorted_(found: CellResult) -> CellResult:
        passed, voted = (
            None if each is None else each[order] for each in (found.passed, found.voted)
        )
        texts = [found.texts[i] for i in order] if found.texts else []
        return CellResult(found.correct[order], texts, passed, voted)

    return EvalResult(first.ids, {cell: sorted_(each) for cell, each in second.cells.items()})


def _columns(first: EvalResult, second: EvalResult, cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """(pool, level) of the macro averages over corruptions that both have all of."""
    return [
        column
        for column in first.columns
        if column in second.columns
        and all(
            cell in cells
            for result in (first, second)
            for cell in result.cells
            if (cell.pool, cell.level) == column
        )
    ]


def _differences(
    first: EvalResult,
    second: EvalResult,
    cells: Sequence[Cell],
    columns: Sequence[tuple[str, int]],
    bootstrap: Bootstrap,
) -> Measured:
    """Accuracy and drop of the first minus those of the second."""

    def rows(result: EvalResult) -> Floats:
        macros = [result.scores(*column) for column in columns]
        return np.array([*macros, *(result.cells[cell].correct for cell in cells)])

    # On an imagined image one arm is right where the other is wrong: of the models and, for the
    # drop, of clean and degraded.
    seen = bootstrap.seen
    wanted = {"accuracy": seen(rows(first)) - seen(rows(second), arm=2)}
    if Cell() in cells:
        clean, other = (each.cells[Cell()].correct[None] for each in (first, second))
        drop = seen(clean) - seen(rows(first), arm=2)
        wanted["drop"] = drop - (seen(other, arm=2) - seen(rows(second)))
    return Measured(columns, cells, bootstrap.estimates(wanted), bootstrap.coverage)


def _as_json(measured: Measured) -> dict[str, Any]:
    found, columns = measured.entries(), measured.columns
    degraded = [i for i, (_, level) in enumerate(columns) if level]
    summary: dict[str, Any] = {
        "images": measured.images,
        "pools": tree_of(columns, found["accuracy"][: len(columns)]),
    }
    if "drop" in found and degraded:
        entries = [{"drop": found["drop"][i]} for i in degraded]
        summary["robustness"] = tree_of([columns[i] for i in degraded], entries)
    detail = []
    for i, cell in enumerate(measured.cells, len(columns)):
        drop = {"drop": found["drop"][i]} if "drop" in found and cell.level else {}
        detail.append(asdict(cell) | (found["accuracy"][i] or {}) | drop)
    return summary | {"detail": detail}


def marked(entry: Mapping[str, float]) -> bool:
    """Whether the interval of a difference excludes 0."""
    return entry["low"] > 0 or entry["high"] < 0
