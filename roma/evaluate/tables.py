"""Tables of an evaluation for a terminal of 80 columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from roma.evaluate.columns import columns_of
from roma.evaluate.summary import ROBUSTNESS, SEVERAL
from roma.evaluate.wording import (
    Entry,
    direction,
    number,
    signed,
    signed_number,
    with_interval,
)

_COLUMNS = 80
_NAME = 22  # columns for a benchmark's name; a longer one goes on in the next line


def summary_table(summary: Mapping[str, Any]) -> Group:
    """A summary for the terminal: a row per corruption, a macro average below each pool.

    Below it, what compares with the clean images, and what several answers gave.

    Args:
        summary: of `summarise`.
    """
    # Not the table's title, which would wrap at the table's own width.
    title = f"Accuracy, % [95 % interval], {summary['images']} images"
    if clean := summary["pools"].get("clean"):
        title += "\nclean: " + with_interval(clean)
    shown: list[RenderableType] = [Text(title)]
    rows = list(_by_corruption(summary))
    if rows:
        levels = list(dict.fromkeys(level for _, entries in rows for level in entries))
        widest = max(len(with_interval(e)) for _, entries in rows for e in entries.values())
        first = max(len(name) for name, _ in rows)
        # 2: between columns, at the edges
        fits = 2 + first + len(levels) * (widest + 2) <= _COLUMNS
        table = _table("corruption", levels)
        for name, entries in rows:
            mean = name.endswith(": mean")
            cells = [
                _cell(with_interval if fits else _below, entries.get(level)) for level in levels
            ]
            table.add_row(name, *cells, style="bold" if mean else None, end_section=mean)
        shown.append(table)
    return Group(*shown, *robustness_tables(summary))


def robustness_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Pool by level: what compares with the clean images, and what several answers gave.

    Args:
        summary: of `summarise`, or a part of `summarise_suite`'s.
    """
    accuracy, several = columns_of(summary["pools"]), columns_of(summary.get("several", {}))
    robust = columns_of(summary.get("robustness", {}))
    if robust:
        yield Text(
            "Against clean images: drop, points; relative = 100 · degraded / clean, %;\n"
            "flips, % of questions: corrective, wrong to right; destructive, right to wrong"
        )
        rows = {name: {"accuracy": accuracy[name]} | entries for name, entries in robust.items()}
        yield _rows(("accuracy", *ROBUSTNESS), rows)
    if several:
        yield Text("Several answers, %: mean; any of them right (pass); the most frequent right")
        rows = {name: {"accuracy": accuracy[name]} | entries for name, entries in several.items()}
        yield _rows(("accuracy", *SEVERAL), rows)


def suite_table(suite: Mapping[str, Any]) -> Group:
    """Several benchmarks for the terminal: a row each, and their average; accuracies per column.

    Below it, what compares with the clean images: of the average, or of a benchmark that is alone.

    Args:
        suite: of `summarise_suite`.
    """
    rows = dict(suite["benchmarks"])
    if "average" in suite:
        rows["average"] = suite["average"]
    found = {name: columns_of(row["pools"]) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for entries in found.values() for column in entries))
    images = sum(row["images"] for row in suite["benchmarks"].values())
    title = f"Accuracy, % (95 % interval), {images} images"
    shown: list[RenderableType] = [Text(title)]
    width = min(_NAME, max(map(len, found)))
    at_once = (_COLUMNS - 2 - width) // 8  # "90–100" and two spaces
    for start in range(0, len(columns), at_once):
        some = columns[start : start + at_once]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column("benchmark", overflow="fold", width=width)
        for column in some:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for name, entries in found.items():
            cells = [_cell(_short, entries.get(column)) for column in some]
            words = _in_lines(name, width)
            table.add_row(words, *cells, style="bold" if name == "average" else None)
        shown.append(table)
    below = next(reversed(rows.values())) if "average" in rows or len(rows) == 1 else {"pools": {}}
    return Group(*shown, *robustness_tables(below))


def _in_lines(name: str, width: int) -> str:
    """A name in lines of a width, broken behind a "_" where there is one.

    Example:
        >>> _in_lines("mathvista_testmini_cot_reasoning", 22).split()
        ['mathvista_testmini_', 'cot_reasoning']
    """
    lines = [""]
    for word in name.replace("_", "_\0").split("\0"):
        if lines[-1] and len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def comparison_table(comparison: Mapping[str, Any]) -> Group:
    """Differences of two models for the terminal; * where the interval excludes 0.

    Args:
        comparison: of `compare`.
    """
    first, second = comparison["first"], comparison["second"]
    shown: list[RenderableType] = [
        Text(f"{first} minus {second}: points [95 % interval], paired; * if it excludes 0")
    ]
    rows = dict(comparison["benchmarks"])
    if "average" in comparison:
        rows["average"] = comparison["average"]
    for name, row in rows.items():
        robust, several = columns_of(row.get("robustness", {})), columns_of(row.get("several", {}))
        columns = ["accuracy", *(["drop"] if robust else []), *(SEVERAL if several else ())]
        table = _table("", columns)
        form = signed if len(columns) <= 2 else _signed_below
        for key, entry in columns_of(row["pools"]).items():
            entries = {"accuracy": entry} | robust.get(key, {}) | several.get(key, {})
            table.add_row(key, *(_marked(form, entries.get(column)) for column in columns))
        shown += [Text(f"{name}, {row['images']} images"), table]
    for word, said in (("left out", "left_out"), ("asked differently", "differing")):
        shown += [Text(f"{word}: {each}") for each in comparison[said]]
    return Group(*shown)


def _by_corruption(summary: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name, a corruption or "POOL: mean", and its entries, level by level."""
    for pool, macros in summary["pools"].items():
        if pool == "clean":
            continue
        found: dict[str, dict[str, Any]] = {}
        for row in summary["detail"]:
            if row["pool"] == pool:
                found.setdefault(row["corruption"], {})[f"L{row['level']}"] = row
        yield from found.items()
        yield f"{pool}: mean", macros


def _rows(columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table of entries in two lines each."""
    table = _table("", columns)
    for name, entries in rows.items():
        table.add_row(name, *(_cell(_below, entries.get(column)) for column in columns))
    return table


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(form: Callable[[Entry], str], entry: Entry | None) -> Text:
    return Text(form(entry) if entry else "–")


def _marked(form: Callable[[Entry], str], entry: Entry | None) -> Text:
    return Text(form(entry) + ("*" if direction(entry) else " ") if entry else "–")


def _below(entry: Entry) -> str:
    """A mean over its interval."""
    low, high = number(entry["low"]), number(entry["high"])
    return f"{number(entry['mean'])}\n{low}{' to ' if entry['low'] < 0 else '–'}{high}"


def _short(entry: Entry) -> str:
    """The same where seven stand in a row."""
    return f"{number(entry['mean'])}\n{entry['low']:.0f}–{entry['high']:.0f}"


def _signed_below(entry: Entry) -> str:
    low, high = signed_number(entry["low"]), signed_number(entry["high"])
    return f"{signed_number(entry['mean'])}\n{low}, {high}"
