"""Made-up models of reports, whose answers are told or drawn; and the tables of their pages."""

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser

import numpy as np

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import Results
from roma.evaluate.report.content import Content
from roma.evaluate.report.plots import styles_of
from roma.evaluate.report.sections import page_of
from roma.evaluate.result import CellResult, EvalResult

CELLS = [Cell(), Cell("seen", "jpeg", 1), Cell("seen", "jpeg", 3), Cell("seen", "downscale", 3)]
RIGHT = {
    "first": ["11111111", "11111110", "11110000", "11000000"],
    "second": ["11110000", "11110000", "11110000", "11110000"],
}
"""Model → for each of CELLS, which of eight questions it answers right."""


def result_of(cells: Mapping[Cell, Sequence[int]]) -> EvalResult:
    found = {cell: CellResult(np.array(row, np.uint8), []) for cell, row in cells.items()}
    return EvalResult([f"q{i}" for i in range(len(next(iter(cells.values()))))], found)


def named(name: str, *rows: str, cells: Sequence[Cell] = CELLS) -> Results:
    every = {cell: [int(sign) for sign in row] for cell, row in zip(cells, rows, strict=True)}
    return Results(name, {"seed": 0, "engine": "hf"}, {"digits": result_of(every)})


def both() -> list[Results]:
    return [named(name, *rows) for name, rows in RIGHT.items()]


def noisy(name: str, cells: Sequence[Cell], count: int, benchmarks: Sequence[str]) -> Results:
    rng = np.random.default_rng(len(name))
    made = {each: {c: rng.integers(0, 2, count) for c in cells} for each in benchmarks}
    return Results(name, {"seed": 0}, {each: result_of(found) for each, found in made.items()})


class Tables(HTMLParser):
    """Tables of a page: the cells of each row as (text, columns that it spans, CSS classes)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, int, str]]]] = []
        self._cell: list[str] | None = None
        self.open: list[str] = []
        self.seen: set[str] = set()  # tags and attributes
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.seen |= {tag, *given}
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
            span = int(given.get("colspan") or 1)
            self.tables[-1][-1].append(("", span, given.get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        if tag in ("td", "th") and self._cell is not None:
            _, span, kind = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = ("".join(self._cell), span, kind)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data if not self._cell else f" {data}")


def page_with(content: Content) -> str:
    return page_of(content, {}, styles_of(list(content.models)))
