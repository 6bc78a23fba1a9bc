"""The findings of a report in sentences; higher or lower only where an interval excludes 0."""

from collections.abc import Iterator, Mapping
from typing import Any

from roma.evaluate.report.columns import columns_of, hardest_columns
from roma.evaluate.report.content import Content, Summary, column, corruptions
from roma.evaluate.report.wording import direction, finding, with_interval

CAVEAT = (
    "Brackets are 95 % intervals over questions, paired between conditions and between models. They"
    " cover neither the training of a model nor the sampling of its answers, and they are not"
    " widened for the number of comparisons."
)


def opening(content: Content) -> str:
    """What was measured: models, benchmarks, questions, conditions."""
    suite = next(iter(content.models.values()))
    benchmarks = suite["benchmarks"]
    questions = sum(found["images"] for found in benchmarks.values())
    firsts = [next(iter(each["benchmarks"].values())) for each in content.models.values()]
    counts = (
        (len(content.models), "model"),
        (len(benchmarks), "benchmark"),
        (questions, "question"),
    )
    said = ", ".join(f"{count:,} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    kinds = {kind for each in firsts for found in corruptions(each).values() for kind in found}
    levels = sorted({row["level"] for each in firsts for row in each["detail"]} - {0})
    conditions = ["clean images"] if any("clean" in each["pools"] for each in firsts) else []
    if kinds:
        plural = "" if len(kinds) == 1 else "s"
        at = ", ".join(map(str, levels))
        conditions.append(f"{len(kinds)} corruption{plural} at level{'s'[: len(levels) > 1]} {at}")
    return f"{said}; {' and '.join(conditions)}."


def findings(content: Content) -> list[str]:
    """A sentence or more on each model, then one on each paired difference."""
    heading, summaries = next(iter(content.parts.items()))
    benchmarks = next(iter(content.models.values()))["benchmarks"]
    averaged = heading not in benchmarks
    said: list[str] = []
    for model, summary in summaries.items():
        said += _of_model(model, summary)
    for model, summary in content.differing.get(heading, {}).items():
        subject = f"{model} minus {content.against}"
        said.append(finding(subject, column(summary, "accuracy")))
        if averaged:
            said += _by_benchmark(content, heading, model)
    if averaged:
        said.insert(0, f"Unless one is named: {heading}, each of the same weight.")
    elif len(benchmarks) > 1:
        said.insert(0, f"Of {heading}; the benchmarks have no condition in common.")
    return said


def _of_model(model: str, summary: Summary) -> Iterator[str]:
    """What degradation takes from it, and where it is worst."""
    drop = column(summary, "drop")
    if drop:
        yield finding(f"{model}: degraded minus clean images", _negative(drop))
    rows = [row for row in summary["detail"] if row["corruption"]]
    if len(rows) > 1:
        worst = min(rows, key=lambda row: row["mean"])
        where = f"{worst['corruption'].replace('_', ' ')} at L{worst['level']}"
        yield f"{model}: lowest under {where}, {with_interval(worst)} % right."


def _by_benchmark(content: Content, heading: str, model: str) -> Iterator[str]:
    """At which benchmarks the model is higher or lower, where conditions are hardest."""
    parts = {name: own[model] for name, own in content.differing.items() if name != heading}
    for where in hardest_columns(column(content.differing[heading][model], "accuracy")):
        ways: dict[str, list[str]] = {"up": [], "down": [], "": []}
        for name, summary in parts.items():
            ways[direction(columns_of(column(summary, "accuracy"))[where])].append(name)
        shown = {"higher": ways["up"], "lower": ways["down"]}
        said = "; ".join(f"{way} on {', '.join(names)}" for way, names in shown.items() if names)
        if said:
            left = f"no difference shown on {len(ways[''])} of {len(parts)}"
            yield f"{model} minus {content.against}, {where}, by benchmark: {said}; {left}."


def _negative(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every entry of a tree with its sign turned."""
    if "mean" in tree:
        return {"mean": -tree["mean"], "low": -tree["high"], "high": -tree["low"]}
    return {name: _negative(found) for name, found in tree.items()}
