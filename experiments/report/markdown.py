"""A report's tables as Markdown: `python -m experiments.report.markdown REPORT.json`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report.columns import compared_in
from experiments.report.costs import cpu_seconds_of, steps_of
from experiments.report.plots import arm_style
from roma.evaluate.columns import columns_of
from roma.evaluate.report.markdown import table
from roma.evaluate.wording import signed


def tables(report: Mapping[str, Any]) -> str:
    """Accuracies with steps and CPU seconds, then paired differences, mean over seeds.

    Differences stand clean, inside the range of training, beyond it, and under every attack.
    """
    parts = [_accuracies(report)]
    if report["differences"]:
        parts.append(_differences(report))
    return "\n\n".join("\n".join(part) for part in parts)


def _accuracies(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for arm, tree in report["arms"].items():
        costs = report["costs"].get(arm)
        rows.append(([arm_style(arm).label, steps_of(costs), cpu_seconds_of(costs)], tree))
    return table(["arm", "steps", "CPU s a run"], rows, lambda entry: f"{entry['mean']:.1f}")


def _differences(report: Mapping[str, Any]) -> list[str]:
    inside, beyond = compared_in(report)
    every = columns_of(next(iter(report["arms"].values())))
    columns = [c for c in every if c in inside or "adv" in c]
    columns += [c for c in beyond if c not in columns]
    rows = []
    for name, by_seed in report["differences"].items():
        label = " − ".join(arm_style(arm).label for arm in name.split("-"))
        flat = columns_of(by_seed["mean"])
        rows.append(([label], {column: flat[column] for column in columns}))
    return table(["difference, points"], rows, signed)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
