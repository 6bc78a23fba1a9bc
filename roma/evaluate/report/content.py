"""What a report shows: summaries of models over benchmarks, and the columns within them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roma.evaluate.wording import Entry

MEASURES = {
    "drop": "drop: clean minus degraded accuracy, points",
    "relative": "relative robustness: degraded in % of clean accuracy",
    "corrective": "corrective flips: clean wrong, degraded right, % of questions",
    "destructive": "destructive flips: clean right, degraded wrong, % of questions",
    "pass": "pass: any of a question's answers is right, % of questions",
    "majority": "majority: the most frequent answer is right, % of questions",
}
"""Columns beside accuracy, in order → what they are."""

Summary = Mapping[str, Any]
"""Of `roma.evaluate.summary.summarise`: one model on one benchmark, or an average of such."""

Suite = Mapping[str, Any]
"""Of `roma.evaluate.summary.summarise_suite`: one model on all its benchmarks."""


@dataclass(frozen=True)
class Content:
    """All that a report is made of.

    Attributes:
        title: of the report.
        models: name → what it did; all on the same benchmarks.
        differences: name → its differences to `against`, in the form of a suite; paired.
        against: the model that the others are compared with.
        settings: model → what was asked of it.
        notes: of the run, in sentences.
        warnings: what else was asked differently of the models that are compared, in sentences.
        asked: the settings that are a word or a number, in sentences.
    """

    title: str
    models: Mapping[str, Suite]
    differences: Mapping[str, Suite] = field(default_factory=dict)
    against: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    asked: Sequence[str] = ()

    @property
    def parts(self) -> dict[str, dict[str, Summary]]:
        """Heading → model → summary: the average over benchmarks first, then each benchmark."""
        return _turned({model: parts_of(suite) for model, suite in self.models.items()})

    @property
    def differing(self) -> dict[str, dict[str, Summary]]:
        """The same of the differences: heading → model → difference to `against`."""
        return _turned({model: parts_of(suite) for model, suite in self.differences.items()})


def parts_of(suite: Suite) -> dict[str, Summary]:
    """Heading → summary: the average over several benchmarks first.

    Example:
        >>> list(parts_of({"benchmarks": {"a": {}, "b": {}}, "average": {}}))
        ['average over 2 benchmarks', 'a', 'b']
    """
    benchmarks = suite["benchmarks"]
    average = {f"average over {len(benchmarks)} benchmarks": suite.get("average")}
    return {name: found for name, found in (average | benchmarks).items() if found is not None}


def column(summary: Summary, name: str) -> dict[str, Any]:
    """One of the columns as a tree, pool → level → entry; empty where it was not measured.

    Args:
        summary: of a model, or a difference of two.
        name: "accuracy", or a key of `MEASURES`.

    Example:
        >>> column({"robustness": {"seen": {"L1": {"drop": None}}}}, "drop")
        {'seen': {'L1': None}}
    """
    if name == "accuracy":
        return dict(summary["pools"])
    found: dict[str, Any] = {}
    for nested in (summary.get("robustness", {}), summary.get("several", {})):
        for pool, below in nested.items():
            if name in below:
                found[pool] = below[name]
            levels = {k: v[name] for k, v in below.items() if isinstance(v, Mapping) and name in v}
            if name not in below and levels:
                found[pool] = levels
    return found


def corruptions(summary: Summary) -> dict[str, dict[str, dict[str, Entry]]]:
    """Pool → corruption → level → the row of "detail"; without the clean one."""
    found: dict[str, dict[str, dict[str, Entry]]] = {}
    for row in summary["detail"]:
        if row["corruption"]:
            kinds = found.setdefault(row["pool"], {})
            kinds.setdefault(row["corruption"], {})[f"L{row['level']}"] = row
    return found


def _turned(by_model: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, Summary]]:
    turned: dict[str, dict[str, Summary]] = {}
    for model, parts in by_model.items():
        for heading, summary in parts.items():
            turned.setdefault(heading, {})[model] = summary
    return turned
