"""Tables of a page: rows over the columns clean and each pool at each level, as HTML."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from roma.evaluate.columns import groups_of
from roma.evaluate.wording import Entry, direction, number, signed_number

Form = Callable[[Entry], tuple[str, str]]
"""How an entry is shown: its CSS class and its HTML."""

ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """A row: its label as HTML, its entries as a tree, cells before them as HTML, a CSS class."""

    label: str
    tree: Mapping[str, Any]
    more: Sequence[str] = ()
    kind: str = ""


@dataclass(frozen=True)
class Block:
    """Rows under a heading (HTML) that spans the table; `form` None: the table's."""

    rows: Sequence[Row]
    title: str = ""
    form: Form | None = None


def table(blocks: Sequence[Block], first: Sequence[str], form: Form, *, kind: str = "") -> str:
    """Blocks of rows that share their columns.

    Args:
        blocks: at least one row; the columns are those of all rows' trees: group → sub-column →
            entry, or a group that is itself an entry. An entry that is missing or None is a dash.
        first: headings of the label and of each row's `more`.
        form: of the entries.
        kind: CSS class of the table.
    """
    groups = groups_of([row.tree for block in blocks for row in block.rows])
    width = len(first) + sum(len(below) or 1 for below in groups.values())
    body = ""
    for block in blocks:
        if block.title:
            body += f'<tr class="pair"><td colspan="{width}">{block.title}</td></tr>'
        body += "".join(_row(row, groups, block.form or form) for row in block.rows)
    return f"<table{_classes(kind)}>{_head(groups, first)}<tbody>{body}</tbody></table>"


def share_form(entry: Entry) -> tuple[str, str]:
    """A share in percent over its interval."""
    low, high = number(entry["low"]), number(entry["high"])
    return "", f"{number(entry['mean'])}<small>[{low}, {high}]</small>"


def difference_form(entry: Entry) -> tuple[str, str]:
    """A difference in points over its interval, coloured where that excludes 0."""
    low, high = signed_number(entry["low"]), signed_number(entry["high"])
    return direction(entry), f"{signed_number(entry['mean'])}<small>[{low}, {high}]</small>"


def _head(groups: Mapping[str, Sequence[str]], first: Sequence[str]) -> str:
    """Two rows: groups over their sub-columns; a group without any spans both."""
    top = "".join(f'<th class="first" rowspan="2">{escape(name)}</th>' for name in first)
    below = ""
    for name, inner in groups.items():
        if inner:
            top += f'<th class="group" colspan="{len(inner)}">{escape(name)}</th>'
            below += "".join(
                f"<th{_classes('' if turn else 'start')}>{escape(column)}</th>"
                for turn, column in enumerate(inner)
            )
        else:
            top += f'<th rowspan="2">{escape(name)}</th>'
    return f"<thead><tr>{top}</tr><tr>{below}</tr></thead>"


def _row(row: Row, groups: Mapping[str, Sequence[str]], form: Form) -> str:
    cells = "".join(f"<td>{cell}</td>" for cell in row.more)
    for entry, start in _entries(row.tree, groups):
        kind, shown = ("", ABSENT) if entry is None else form(entry)
        cells += f"<td{_classes(start, kind)}>{shown}</td>"
    return f'<tr{_classes(row.kind)}><td class="name">{row.label}</td>{cells}</tr>'


def _classes(*names: str) -> str:
    """The attribute, where there is a name."""
    given = " ".join(filter(None, names))
    return f' class="{given}"' if given else ""


def _entries(
    tree: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Entry | None, str]]:
    """Entries in column order, each with its CSS class: "start" where a group starts."""
    for name, inner in groups.items():
        found = tree.get(name)
        if not inner:
            yield found, ""
        for turn, column in enumerate(inner):
            yield (found or {}).get(column), "" if turn else "start"
