"""The tables of a report on a terminal, 80 columns wide."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.report.costs import cpu_seconds_of, steps_of
from experiments.report.plots import arm_style
from experiments.report.report import summary
from roma.evaluate.columns import columns_of, hardest_columns
from roma.evaluate.wording import signed

_ABREAST = 5  # arms of one table: what 80 columns hold


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the accuracies, the differences per seed at the highest level, and the summary."""
    console = console or Console()
    arms = list(report["arms"])
    for start in range(0, len(arms), _ABREAST):
        console.print(_accuracy_table(report, arms[start : start + _ABREAST]))
    if report["differences"]:
        console.print(_difference_table(report))
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


def _difference_table(report: Mapping[str, Any]) -> Table:
    columns = hardest_columns(next(iter(report["arms"].values())))
    title = "Paired differences, percentage points"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
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
