"""Tables of an evaluation for a terminal of 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

# One cell of the table: in a line where the terminal is wide enough for it, else in two.
_BESIDE, _BELOW = "{mean:.1f} [{low:.1f}, {high:.1f}]", "{mean:.1f}\n{low:.1f}–{high:.1f}"
_COLUMNS = 80


def summary_table(summary: Mapping[str, Any]) -> Group:
    """A summary for the terminal: a row per corruption, a macro average below each pool.

    Args:
        summary: of `summarise`.
    """
    pools = dict(summary["pools"])
    # Not the table's title, which would wrap at the table's own width.
    title = f"Accuracy, % [95 % interval], {summary['images']} images"
    if clean := pools.pop("clean", None):
        title += "\nclean: " + _BESIDE.format(**clean)
    rows: list[tuple[str, list[Mapping[str, Any]]]] = []
    for pool, macros in pools.items():
        found = [row for row in summary["detail"] if row["pool"] == pool]
        for kind in dict.fromkeys(row["corruption"] for row in found):
            rows.append((kind, [row for row in found if row["corruption"] == kind]))
        rows.append((f"{pool}: mean", list(macros.values())))
    if not rows:
        return Group(Text(title))
    levels = sorted({row["level"] for row in summary["detail"]} - {0})
    widest = max(len(_BESIDE.format(**entry)) for _, entries in rows for entry in entries)
    first = max(len(name) for name, _ in rows)
    fits = 2 + first + len(levels) * (widest + 2) <= _COLUMNS  # 2: between columns, at the edges
    form = _BESIDE if fits else _BELOW
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("corruption", no_wrap=True)
    for level in levels:
        table.add_column(f"L{level}", justify="right", no_wrap=True)
    for name, entries in rows:
        mean = name.endswith(": mean")
        cells = [Text(form.format(**entry)) for entry in entries]
        table.add_row(name, *cells, style="bold" if mean else None, end_section=mean)
    return Group(Text(title), table)


def suite_table(suite: Mapping[str, Any]) -> Group:
    """Several benchmarks for the terminal: a row each, and their average; accuracies per column.

    Args:
        suite: of `summarise_suite`.
    """
    rows = dict(suite["benchmarks"])
    if "average" in suite:
        rows["average"] = suite["average"]
    columns = list(dict.fromkeys(each for row in rows.values() for each in flat(row["pools"])))
    table = _table("benchmark", columns)
    for name, row in rows.items():
        entries = flat(row["pools"])
        cells = [_cell(_BELOW, entries.get(column)) for column in columns]
        mean = name == "average"
        table.add_row(name, *cells, style="bold" if mean else None)
    return Group(Text("Accuracy, % [95 % interval]"), table)


def comparison_table(comparison: Mapping[str, Any]) -> Group:
    """Differences of two models for the terminal; * where the interval excludes 0.

    Args:
        comparison: of `compare`.
    """
    rows = dict(comparison["benchmarks"])
    if "average" in comparison:
        rows["average"] = comparison["average"]
    title = f"{comparison['first']} minus {comparison['second']}, points [95 % interval]"
    table = _table("", ["accuracy", "drop"])
    for name, row in rows.items():
        drops = {key: each["drop"] for key, each in flat(row.get("robustness", {})).items()}
        for key, entry in flat(row["pools"]).items():
            table.add_row(f"{name} {key}", _signed(entry), _signed(drops.get(key)))
    notes = [Text(f"left out: {each}") for each in comparison["left_out"]]
    return Group(Text(title), table, *notes)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of pools and levels as "clean", "seen L1", … → what stands there.

    Example:
        >>> flat({"clean": {"mean": 90.0}, "seen": {"L1": {"mean": 80.0}}})
        {'clean': {'mean': 90.0}, 'seen L1': {'mean': 80.0}}
    """
    found = {}
    for pool, below in tree.items():
        if pool == "clean":
            found[pool] = below
        else:
            found |= {f"{pool} {level}": each for level, each in below.items()}
    return found


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(form: str, entry: Mapping[str, float] | None) -> Text:
    return Text(form.format(**entry) if entry else "–")


def _signed(entry: Mapping[str, float] | None) -> Text:
    if not entry:
        return Text("–")
    sign = "*" if entry["low"] > 0 or entry["high"] < 0 else " "
    return Text("{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**entry) + sign)
