"""Answers as they come: a file that grows batch by batch, so that a run that was cut goes on.

A folder of results holds `settings.json`, what was asked, and `answers.jsonl`, a line for every
question at every cell, in the order in which they were answered. Lines are added a batch at a time
and are on disk before the next batch starts. A line that was cut is dropped when the file is opened
again, and its question is asked again.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roma.evaluate.conditions import Cell
from roma.evaluate.result import CellResult, EvalResult
from roma_kernels.errors import fail

SETTINGS = "settings.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Row:
    """One question at one cell.

    Attributes:
        id: of the question.
        cell: the condition of its images.
        texts: the k answers.
        correct: of each answer, 1 = right; empty where nothing has scored them yet.
        voted: whether the most frequent of several answers is right; None for one answer.
    """

    id: str
    cell: Cell
    texts: Sequence[str]
    correct: Sequence[int] = ()
    voted: int | None = None

    def to_line(self) -> str:
        """The row as a line of JSON."""
        where = [self.cell.pool, self.cell.corruption, self.cell.level]
        row = {"id": self.id, "cell": where, "correct": list(self.correct), "voted": self.voted}
        return json.dumps(row | {"texts": list(self.texts)}, ensure_ascii=False) + "\n"

    @classmethod
    def of_line(cls, line: str) -> "Row":
        """Reads what `to_line` wrote."""
        row = json.loads(line)
        return cls(row["id"], Cell(*row["cell"]), row["texts"], row["correct"], row["voted"])


class Record:
    """The rows of one file, added to batch by batch.

    Args:
        folder: made if absent.
        settings: what was asked; JSON-able. A folder that was begun with others is refused.
        file: name of the file of rows.

    Raises:
        ValueError: the folder was begun with other settings; the first that differs is named.
        FileExistsError: `folder` is a file.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], *, file: str = ANSWERS
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            fail("out", "a folder", f"the file {folder}", "name another", error=FileExistsError)
        self.folder.mkdir(parents=True, exist_ok=True)
        _hold(self.folder, settings)
        self.path = self.folder / file
        _drop_torn_line(self.path)
        self._done = {(row.cell, row.id) for row in self.rows()}

    def __len__(self) -> int:
        return len(self._done)

    def has(self, cell: Cell, id: str) -> bool:
        """Whether the question was answered at the cell."""
        return (cell, id) in self._done

    def add(self, rows: Sequence[Row]) -> None:
        """Appends a batch; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(row.to_line() for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self._done.update((row.cell, row.id) for row in rows)

    def rows(self) -> Iterator[Row]:
        """Every row, in the order in which they were added; one at a time is in memory."""
        return read_rows(self.path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; none where there is no such file."""
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            yield from map(Row.of_line, lines)


def read_result(path: Path, *, texts: bool = False) -> EvalResult:
    """What a file of rows says, with questions in the order of the first cell's rows.

    Args:
        path: an `answers.jsonl`.
        texts: keep the answers' texts, of each question the first; they are the bulk of the file.

    Raises:
        ValueError: there is no row, or a cell lacks some of the questions.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        remedy = "name the folder that `roma eval` or `roma bench-vlm` wrote"
        got = f"none in {path.parent}"
        fail("results", f"a file {path.name}", got, remedy, error=FileNotFoundError)
    found: dict[Cell, dict[str, Row]] = {}
    for row in read_rows(path):
        kept = row if texts else Row(row.id, row.cell, (), row.correct, row.voted)
        found.setdefault(row.cell, {})[row.id] = kept
    most = max(map(len, found.values()), default=0)
    ids = next((list(rows) for rows in found.values() if len(rows) == most), [])
    missing = sum(len(ids) - len(rows) for rows in found.values())
    if not ids or missing:
        got = f"{missing} missing" if ids else "none"
        fail(f"answers in {path}", "all", got, "run the same command again to complete them")
    return EvalResult(ids, {cell: _column(ids, rows) for cell, rows in found.items()})


def _column(ids: Sequence[str], rows: Mapping[str, Row]) -> CellResult:
    every = [rows[id] for id in ids]
    right = np.array([row.correct for row in every], dtype=np.uint8)  # [n, k]
    texts = [row.texts[0] for row in every if row.texts]
    if right.shape[1] == 1:
        return CellResult(right[:, 0], texts)
    voted = np.array([row.voted for row in every], dtype=np.uint8)
    return CellResult(right.mean(1), texts, passed=right.max(1), voted=voted)


def _hold(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a new folder, and holds an old one's to them."""
    path = folder / SETTINGS
    asked = json.loads(json.dumps(settings))  # as they are read: tuples are lists
    if not path.exists():
        text = json.dumps(asked, indent=1, ensure_ascii=False)
        written = path.with_suffix(".new")
        written.write_text(text + "\n", encoding="utf-8")
        written.replace(path)  # all of it or nothing
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for key in dict.fromkeys([*asked, *begun]):
        if asked.get(key) != begun.get(key):
            got = f"{key} = {begun.get(key)!r} there and {asked.get(key)!r} here"
            fail("out", "a new folder, or one begun with the same settings", got, "name another")


def _drop_torn_line(path: Path) -> None:
    """Cuts what follows the last line break: a line that was not written to its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
