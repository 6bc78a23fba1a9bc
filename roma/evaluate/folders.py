"""Folders of results, whichever command wrote them.

OUT/{settings.json, answers.jsonl, eval.json, …}                    `roma eval`
OUT/{settings.json, bench.json, …}, OUT/BENCHMARK/answers.jsonl     `roma bench-vlm`
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma.evaluate.record import ANSWERS, SETTINGS, read_result
from roma.evaluate.result import EvalResult
from roma_kernels.errors import fail

_EVAL, _BENCH = "eval.json", "bench.json"
_REMEDY = "name the folder that `roma eval` or `roma bench-vlm` wrote"


@dataclass(frozen=True)
class Results:
    """One model on one or more benchmarks.

    Attributes:
        name: the folder's.
        settings: what was asked: settings.json.
        benchmarks: name → what was found.
    """

    name: str
    settings: dict[str, Any]
    benchmarks: dict[str, EvalResult]


def load_results(
    folder: str | Path, *, texts: bool = False, finished: bool = True, name: str | None = None
) -> Results:
    """Reads a folder of results.

    Args:
        folder: of `roma eval`, whose one benchmark has its data's name, or of `roma bench-vlm`.
        texts: keep the answers' texts.
        finished: refuse a folder whose run did not come to its end, and so has no eval.json or
            bench.json.
        name: of the results; None: the folder's.

    Raises:
        ValueError: the run is not finished, or its files do not fit one another.
        FileNotFoundError: there is no such folder, or no results in it.
    """
    place = Path(folder)
    if not (place / SETTINGS).is_file():
        got = f"none in {folder}" if place.is_dir() else f"no folder {folder}"
        fail("results", f"a file {SETTINGS}", got, _REMEDY, error=FileNotFoundError)
    settings = _settings(place / SETTINGS)
    alone = (place / ANSWERS).is_file()
    parts = [place] if alone else sorted(path.parent for path in place.glob(f"*/{ANSWERS}"))
    summary = place / (_EVAL if alone else _BENCH)
    if not parts and settings.keys() & {"data", "benchmarks"}:
        expected, got = "a finished run", "an unfinished one, of which no answer is scored yet"
        fail(f"results in {folder}", expected, got, "run the same command again to complete it")
    if not parts:
        got = f"none in {folder}"
        fail("results", f"a file {ANSWERS}", got, _REMEDY, error=FileNotFoundError)
    if finished and not summary.is_file():
        expected, got = f"a finished run, with {summary.name}", f"none in {folder}: unfinished"
        fail("results", expected, got, "run the same command again to complete it")
    if alone:
        if not settings.get("data"):
            fail(f"{place / SETTINGS}", 'a key "data"', "none", _REMEDY)
        names = [data_name(settings["data"])]
    else:
        asked = list(settings.get("benchmarks", ()))
        there = [path.name for path in parts]
        names = [name for name in asked if name in there] if asked else there
        if finished and len(names) < len(asked):
            remedy = "run the same command again to complete it"
            fail(f"results in {folder}", ", ".join(asked), ", ".join(names), remedy)
        parts = [place / name for name in names]
    results = (read_result(path / ANSWERS, texts=texts) for path in parts)
    return Results(name or place.resolve().name, settings, dict(zip(names, results, strict=True)))


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        fail(str(path), "a JSON object", "something else", _REMEDY)
    return found


def model_name(model: str | Path) -> str:
    """A model's, for a folder; a checkpoint's "actor" folder goes by its run and step.

    Example:
        >>> model_name("runs/mine/global_step_300/actor"), model_name("Qwen/Qwen3-VL-4B-Instruct")
        ('mine-global_step_300', 'Qwen3-VL-4B-Instruct')
    """
    parts = Path(model).resolve().parts
    return "-".join(parts[-3:-1] if parts[-1] == "actor" else parts[-1:])


def data_name(data: str | Path) -> str:
    """The benchmark of a `roma eval`: its data's name and split.

    Example:
        >>> data_name("data/charts@test"), data_name("data/charts.parquet")
        ('charts@test', 'charts')
    """
    path, split = split_of(data)
    name = path.stem if path.suffix in (".parquet", ".jsonl") else path.name
    return f"{name}@{split}" if split else name


def split_of(data: str | Path) -> tuple[Path, str]:
    """Path and split of PATH@SPLIT; "" without one. A folder above may have the sign in its name.

    Example:
        >>> split_of("me@home/charts@test")[1], split_of("me@home/charts")[1]
        ('test', '')
    """
    path = Path(data)
    name, sign, split = path.name.rpartition("@")
    if not sign:
        return path, ""
    return path.with_name(name) if name else path.parent, split
