"""The tables of a report on a terminal, 80 columns wide."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.report.columns import compared_in
from experiments.report.costs import cpu_seconds_of, steps_of
from experiments.report.plots import arm_style
from experiments.report.report import summary
from roma.evaluate.columns import columns_of
from roma.evaluate.wording import signed

_ABREAST = 5  # arms of one table: what 80 columns hold


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the accuracies, the differences per seed at the compared levels, and the summary."""
    console = console or Console()
    arms = list(report["arms"])
    tables = -(-len(arms) // _ABREAST)
    for part in np.array_split(arms, tables):
        console.print(_accuracy_table(report, part.tolist()))
    for columns, where in zip(compared_in(report), _titles(report), strict=True):
        if report["differences"] and columns:
            console.print(_difference_table(report, columns, where))
    console.print("\n".join(summary(report)), markup=False, highlight=False)


def _accuracy_table(report: Mapping[str, Any], arms: Sequence[str]) -> Table:
    seeds = ", ".join(map(str, report["seeds"]))
    title = f"Accuracy, % (95 % interval below): {report['images']} test images, seeds {seeds}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for arm in arms:
        style = arm_style(arm)
        table.add_column(style.label, justify="right", header_style=f"bold {style.colour}")
    if report["costs"]:
        costs = [report["costs"].get(arm) for arm in arms]
        table.add_row("steps", *map(steps_of, costs))
        table.add_row("CPU s a run", *map(cpu_seconds_of, costs))
    flat = [columns_of(report["arms"][arm]) for arm in arms]
    for column in flat[0]:
        entries = [columns[column] for columns in flat]
        cells = ["{mean:.1f}\n[dim]{low:.1f}–{high:.1f}[/]".format(**entry) for entry in entries]
        table.add_row(column, *cells)
    return table


def _titles(report: Mapping[str, Any]) -> tuple[str, str]:
    """What is said of the columns inside the range of training, and of those beyond."""
    trained_to = report.get("trained_to")
    if trained_to is None:
        return "", ""
    return f": up to training's level {trained_to:g}", f": beyond training's level {trained_to:g}"


def _difference_table(report: Mapping[str, Any], columns: Sequence[str], where: str) -> Table:
    title = f"Paired differences, points{where}"
    # No padding on the left: three intervals and a name of 14 letters then fit in 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=True)
    table.add_column("", max_width=14, overflow="fold")
    table.add_column("seed")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, by_seed in report["differences"].items():
        label = " − ".join(arm_style(arm).label for arm in name.split("-"))
        flat = [columns_of(tree) for tree in by_seed.values()]
        cells = ["\n".join(signed(tree[column]) for tree in flat) for column in columns]
        # Text, not markup: the brackets of an interval would be read as a style.
        table.add_row(Text(label), Text("\n".join(by_seed)), *map(Text, cells))
    return table
