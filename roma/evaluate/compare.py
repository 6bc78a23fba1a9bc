"""Two models on the same images: paired differences, first minus second; `roma eval --compare`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import Results, load_results
from roma.evaluate.intervals import Bootstrap, Floats
from roma.evaluate.result import CellResult, EvalResult, Share
from roma.evaluate.summary import Measured, as_json, average_of
from roma_kernels.errors import fail

# Settings that say which model it was, or that are compared in another way.
_APART = {
    *("model", "model_fingerprint", "data", "data_fingerprint", "questions", "benchmarks"),
    *("cells", "level_table", "seed"),
}

# Settings that say what counts as right, or how long an answer may be; named before others.
_WEIGHTY = (
    *("judge", "reward", "reward_fingerprint", "max_tokens", "max_new_tokens", "decoding"),
    *("temperature", "answers", "format_prompt", "format_fingerprint", "attack_steps"),
)


def compare(first: Results, second: Results) -> dict[str, Any]:
    """Paired differences of two models, first minus second, in points with 95 % intervals.

    Args:
        first: a model's results.
        second: another's, on the same questions and images. What only one of the two has, a
            benchmark or a condition, is named in the result and left out.

    Returns:
        "first", "second": their names; "benchmarks": name → {"images"; "pools" and "detail": as
        `summarise`'s, with differences of accuracy; "robustness", with clean cells alone: pool →
        level → {"drop": entry}; "several", with equally many answers of both alone: pool → level →
        {"pass": entry, "majority": entry}}; "average": the same of the macro average over
        benchmarks, where there are several; "left_out": what only one of the two has, in words;
        "differing": what else was asked differently, in words, what weighs most first.

    Raises:
        ValueError: the two share no benchmark or no condition, or were measured on other
            questions, other images, another seed or other levels.
    """
    pairs, left_out = _pairs(first, second)
    several = first.settings.get("answers") == second.settings.get("answers")
    measured = {
        name: _differences(*pair, Bootstrap(len(pair[0].ids), seed=seed), several=several)
        for seed, (name, pair) in enumerate(pairs.items())
    }
    found: dict[str, Any] = {
        "first": first.name,
        "second": second.name,
        "benchmarks": {name: as_json(each) for name, each in measured.items()},
    }
    if len(measured) > 1 and (whole := average_of(list(measured.values()))):
        found["average"] = as_json(whole)
    return found | {"left_out": left_out, "differing": list(_differing(first, second))}


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


def _pairs(
    first: Results, second: Results
) -> tuple[dict[str, tuple[EvalResult, EvalResult]], list[str]]:
    """The benchmarks that both have, checked and in one order; and what one alone has, in words."""
    shared = [name for name in first.benchmarks if name in second.benchmarks]
    if not shared:
        said = [", ".join(each.benchmarks) for each in (first, second)]
        got = f"{said[0]} in {first.name} and {said[1]} in {second.name}"
        fail("results", "a benchmark that both have", got, "compare runs over the same data")
    left_out = [
        f"{name}: {one.name} alone has it"
        for one, other in ((first, second), (second, first))
        for name in one.benchmarks
        if name not in other.benchmarks
    ]
    pairs = {}
    for name in shared:
        one, other = pairs[name] = first.benchmarks[name], _aligned(first, second, name)
        _check_images(first, second, name)
        if not one.cells.keys() & other.cells.keys():
            got = " and ".join(", ".join(map(str, each.cells)) for each in (one, other))
            fail(f"results of {name}", "a condition that both have", got, "evaluate the same ones")
        for result, lacking, whose in ((one, other, first.name), (other, one, second.name)):
            alone = ", ".join(str(cell) for cell in result.cells if cell not in lacking.cells)
            left_out += [f"{name}, {alone}: {whose} alone has it"] if alone else []
    return pairs, left_out


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names; where they agree, as they were given."""
    one, other = first.resolve().name, second.resolve().name
    return (one, other) if one != other else (str(first), str(second))


def _aligned(first: Results, second: Results, name: str) -> EvalResult:
    """The second's result with its questions in the order of the first's."""
    one, other = first.benchmarks[name], second.benchmarks[name]
    if one.ids == other.ids:
        return other
    place, known = {id: i for i, id in enumerate(other.ids)}, set(one.ids)
    alone = [(id, first.name) for id in one.ids if id not in place]
    alone += [(id, second.name) for id in other.ids if id not in known]
    if alone:
        (id, whose), counts = alone[0], f"{len(one.ids)} and {len(other.ids)}"
        got = f"{counts}, of which {len(alone)} in one alone: {id!r} in {whose}"
        fail(f"questions of {name}", "the same", got, "evaluate both on the same data and limit")
    order = [place[id] for id in one.ids]
    return EvalResult(one.ids, {cell: _sorted(each, order) for cell, each in other.cells.items()})


def _sorted(found: CellResult, order: Sequence[int]) -> CellResult:
    several = [None if each is None else each[order] for each in (found.passed, found.voted)]
    texts = [found.texts[i] for i in order] if found.texts else []
    return CellResult(found.correct[order], texts, *several)


def _check_images(first: Results, second: Results, name: str) -> None:
    """That equal ids are equal questions, and that their images were degraded alike."""
    remedy = "evaluate both on the same images"
    prints = [_fingerprint(each.settings, name) for each in (first, second)]
    if None not in prints and prints[0] != prints[1]:
        ids = [each.benchmarks[name].ids for each in (first, second)]
        alike = ids[0] == ids[1]
        got = "others under the same ids" if alike else "the same ids in another order"
        fail(f"questions of {name} in {second.name}", f"those of {first.name}", got, remedy)
    seeds = [each.settings.get("seed") for each in (first, second)]
    if seeds[0] != seeds[1]:
        got = f"{seeds[0]} in {first.name} and {seeds[1]} in {second.name}"
        fail("seed of the noise", "the same", got, remedy)
    one, other = (_levels(each.settings) for each in (first, second))
    for cell, key in one:
        there, here = one[cell, key], other.get((cell, key), one[cell, key])
        if there != here:
            got = f"{there} in {first.name} and {here} in {second.name} for {cell}, {key}"
            fail("level table", "the same", got, remedy)


def _fingerprint(settings: Mapping[str, Any], name: str) -> str | None:
    """Of the questions of a benchmark, where the settings have it."""
    if "data_fingerprint" in settings:
        return str(settings["data_fingerprint"])
    found = settings.get("benchmarks", {}).get(name, {}).get("fingerprint")
    return None if found is None else str(found)


def _levels(settings: Mapping[str, Any]) -> dict[tuple[Cell, str], Any]:
    """What each cell does to an image, where the settings have it."""
    return {
        (Cell(row["pool"], row["corruption"], row["level"]), key): row[key]
        for row in settings.get("cells", ())
        for key in ("parameter", "reference_size")
        if key in row
    }


def _differing(first: Results, second: Results) -> Iterator[str]:
    """Other settings that differ: the difference of the models is theirs too."""
    one, other = (
        {key: value for key, value in each.settings.items() if key not in _APART}
        for each in (first, second)
    )
    for key in dict.fromkeys([*_WEIGHTY, *one, *other]):
        values = one.get(key), other.get(key)
        if values[0] != values[1]:
            yield _apart(key, *values, first.name, second.name)


def _apart(key: str, one: Any, other: Any, first: str, second: str) -> str:
    """How a setting of two models differs, in words.

    Example:
        >>> _apart("judge", {"by": "model", "model": "Qwen"}, {"by": "none"}, "A", "B")
        "judged by the model Qwen in A, by the tasks' own rules in B"
        >>> _apart("versions", {"roma": "1", "torch": "2.1"}, {"roma": "1"}, "A", "B")
        'versions torch 2.1 in A, none in B'
    """
    if key == "judge":
        said = [_judge(each or {}) for each in (one, other)]
        if said[0] == said[1]:  # a protocol, which is a fingerprint
            return f"{said[0]} in both, but with other prompts or rules"
        return f"{said[0]} in {first}, {said[1].removeprefix('judged ')} in {second}"
    if key.endswith("_fingerprint"):
        return f"the {key.removesuffix('_fingerprint').replace('_', ' ')} has other content"
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        one, other = one or {}, other or {}
        names = [name for name in one | other if one.get(name) != other.get(name)]
        one, other = (
            ", ".join(f"{name} {each[name]}" for name in names if name in each) or "none"
            for each in (one, other)
        )
    shown = ["not set" if each is None else each for each in (one, other)]
    return f"{key.replace('_', ' ')} {shown[0]} in {first}, {shown[1]} in {second}"


def _judge(setting: Mapping[str, Any]) -> str:
    """What said which answers of `roma bench-vlm` are right."""
    by, model = setting.get("by"), setting.get("model")
    if by == "model":
        return f"judged by the model {model}" if model else "judged by a model"
    rules = {"none": "by the tasks' own rules", "rules": "by this package's rules"}
    return f"judged {rules.get(str(by), 'in a way that is not noted')}"


def _differences(
    first: EvalResult, second: EvalResult, bootstrap: Bootstrap, *, several: bool
) -> Measured:
    """The first's columns minus the second's, at the conditions that both have."""
    cells = [cell for cell in first.cells if cell in second.cells]
    partial = {
        (cell.pool, cell.level)
        for result in (first, second)
        for cell in result.cells
        if cell not in cells
    }
    # A macro average over some corruptions of a pool is another column.
    columns = [column for column in first.columns if column not in partial]

    def rows(result: EvalResult, arm: Literal[1, 2], of: Share = "correct") -> Floats:
        found = [getattr(result.cells[cell], of) for cell in cells]
        return bootstrap.seen(
            [*(result.scores(*column, of) for column in columns), *found], arm=arm
        )

    wanted = {"accuracy": rows(first, 1) - rows(second, 2)}
    if Cell() in cells:
        # On an imagined image one arm is right where the other is wrong: of the models, and of
        # clean and degraded.
        clean = [each.cells[Cell()].correct[None] for each in (first, second)]
        drop = bootstrap.seen(clean[0]) - rows(first, 2)
        wanted["drop"] = drop - (bootstrap.seen(clean[1], arm=2) - rows(second, 1))
    if several and first.several and second.several:
        wanted["pass"] = rows(first, 1, "passed") - rows(second, 2, "passed")
        wanted["majority"] = rows(first, 1, "voted") - rows(second, 2, "voted")
    return Measured(columns, cells, bootstrap.estimates(wanted), bootstrap.coverage)
