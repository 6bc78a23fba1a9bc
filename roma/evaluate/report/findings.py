"""The findings of a report in sentences; higher or lower only where an interval excludes 0."""

from collections.abc import Iterator, Mapping
from typing import Any

from roma.evaluate.columns import columns_of, hardest_columns
from roma.evaluate.report.content import Content, Summary, column, corruptions
from roma.evaluate.wording import direction, finding, number, with_interval

_NAMED = 3  # conditions that tie, of which more are counted

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
    return " ".join([f"{said}; {' and '.join(conditions)}.", *_basis(content)])


def _basis(content: Content) -> Iterator[str]:
    """What the findings are of, where there are several benchmarks."""
    heading, benchmarks = next(iter(content.parts)), next(iter(content.models.values()))
    if heading not in benchmarks["benchmarks"]:
        yield f"Findings are of the {heading}, each of the same weight, unless one is named."
    elif len(benchmarks["benchmarks"]) > 1:
        yield f"Findings are of {heading} alone: the benchmarks have no condition in common."


def findings(content: Content) -> list[str]:
    """What sets the models apart, a sentence on each paired difference, then those on each model.

    First stands what else was asked differently: it is part of the differences.
    """
    heading, summaries = next(iter(content.parts.items()))
    benchmarks = next(iter(content.models.values()))["benchmarks"]
    averaged = heading not in benchmarks
    said = list(content.warnings)
    for model, summary in content.differing.get(heading, {}).items():
        subject = f"{model} minus {content.against}"
        said.append(finding(subject, column(summary, "accuracy")))
        if averaged:
            said += _by_benchmark(content, heading, model)
    for model, summary in summaries.items():
        said += _of_model(model, summary)
    return said


def _of_model(model: str, summary: Summary) -> Iterator[str]:
    """What degradation takes from it, and where it is worst."""
    drop = column(summary, "drop")
    if drop:
        yield finding(f"{model}: degraded minus clean images", _negative(drop))
    rows = [row for row in summary["detail"] if row["corruption"]]
    if len(rows) > 1:
        least = min(row["mean"] for row in rows)
        worst = [row for row in rows if row["mean"] == least]
        names = [f"{row['corruption'].replace('_', ' ')} at L{row['level']}" for row in worst]
        if len(worst) == len(rows):
            yield f"{model}: all {len(rows)} degraded conditions alike, {number(least)} % right."
        elif len(worst) == 1:
            yield f"{model}: lowest under {names[0]}, {with_interval(worst[0])} % right."
        else:
            more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
            *heads, last = names[:_NAMED] + more
            yield f"{model}: lowest under {', '.join(heads)} and {last}, {number(least)} % right."


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
