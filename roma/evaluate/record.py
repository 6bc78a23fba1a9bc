"""Answers as they come: a file that grows batch by batch, so that a run that was cut goes on.

A folder of results holds `settings.json`, what was asked, and `answers.jsonl`, a line for every
question at every cell, in the order in which they were answered. Lines are added a batch at a time
and are on disk before the next batch starts. A line that was cut is dropped when the file is opened
again, and its question is asked again.
"""

import errno
import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from roma.evaluate.conditions import Cell
from roma.evaluate.result import CellResult, EvalResult, smallest
from roma_kernels.errors import fail

SETTINGS = "settings.json"
ANSWERS = "answers.jsonl"
_LOCK = ".lock"
# A setting that is a path, and the one that says what is there: the same files by another path.
_CONTENTS = {
    "model": "model_fingerprint",
    "data": "data_fingerprint",
    "format_prompt": "format_fingerprint",
    "level_table": "cells",
}


@dataclass(frozen=True)
class Row:
    """One question at one cell.

    Attributes:
        id: of the question.
        cell: the condition of its images.
        texts: the k answers.
        correct: of each answer, 0..1, 1 = right; empty where nothing has scored them yet.
        voted: whether the most frequent of several answers is right; None for one answer.
        unscored: how many of the answers the reward could not score; they count as wrong.
    """

    id: str
    cell: Cell
    texts: Sequence[str]
    correct: Sequence[float] = ()
    voted: float | None = None
    unscored: int = 0

    def to_line(self) -> str:
        """The row as a line of JSON."""
        where = [self.cell.pool, self.cell.corruption, self.cell.level]
        row = {"id": self.id, "cell": where, "correct": list(self.correct), "voted": self.voted}
        failed = {"unscored": self.unscored} if self.unscored else {}
        return json.dumps(row | failed | {"texts": list(self.texts)}, ensure_ascii=False) + "\n"

    @classmethod
    def of_line(cls, line: str) -> "Row":
        """Reads what `to_line` wrote."""
        row = json.loads(line)
        scored = row["correct"], row["voted"], row.get("unscored", 0)
        return cls(row["id"], Cell(*row["cell"]), row["texts"], *scored)


class Record:
    """The rows of one file, added to batch by batch.

    In memory are the ids, and a byte for each question at each cell.

    Args:
        folder: made if absent.
        settings: what was asked; JSON-able. A folder that was begun with others is refused.
        file: name of the file of rows.
        overwrite: begin anew: the settings and rows that are there are removed.

    Attributes:
        unscored: how many answers the reward could not score.

    Raises:
        ValueError: the folder was begun with other settings, the first that differs is named; its
            files are not what was written; or another process writes there.
        FileExistsError: `folder` is a file.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        file: str = ANSWERS,
        overwrite: bool = False,
    ) -> None:
        """Opens the folder, and finds what is there."""
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            fail("out", "a folder", f"the file {folder}", "name another", error=FileExistsError)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / file
        self._lock = _locked(self.folder)
        if overwrite:
            self.path.unlink(missing_ok=True)
            (self.folder / SETTINGS).unlink(missing_ok=True)
        _hold(self.folder, settings, self.path)
        _drop_torn_line(self.path)
        self._left = self._state()
        self.unscored, self._count = 0, 0
        self._numbers: dict[str, int] = {}
        self._done: dict[Cell, bytearray] = {}
        for row in self.rows():
            self._note(row)

    def __len__(self) -> int:
        return self._count

    def has(self, cell: Cell, id: str) -> bool:
        """Whether the question was answered at the cell."""
        number, done = self._numbers.get(id), self._done.get(cell, b"")
        return number is not None and number < len(done) and bool(done[number])

    def add(self, rows: Sequence[Row]) -> None:
        """Appends a batch; it is on disk when this returns.

        Raises:
            ValueError: the folder is not as this record left it: a second run writes to it, or
                began it anew, perhaps with other settings.
        """
        if self._state() != self._left:
            got, remedy = f"another that wrote to {self.folder}", "let it end, or name another"
            fail("out", "a folder of one run at a time", got, remedy)
        try:
            with self.path.open("ab") as file:
                file.write("".join(row.to_line() for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # its own words name no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._left = self._state()
        for row in rows:
            self._note(row)

    def rows(self) -> Iterator[Row]:
        """Every row, in the order in which they were added; one at a time is in memory."""
        return read_rows(self.path)

    def _state(self) -> tuple[bytes, int]:
        """What changes if another writes here: the settings, and the length of the file."""
        length = self.path.stat().st_size if self.path.exists() else 0
        return (self.folder / SETTINGS).read_bytes(), length

    def _note(self, row: Row) -> None:
        self._count += not self.has(row.cell, row.id)
        self.unscored += row.unscored
        number = self._numbers.setdefault(row.id, len(self._numbers))
        done = self._done.setdefault(row.cell, bytearray())
        done.extend(bytes(max(0, number + 1 - len(done))))
        done[number] = True


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; none where there is no such file.

    Raises:
        ValueError: a line is none that `Record` wrote.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = Row.of_line(line)
            except (ValueError, TypeError, KeyError):
                got = repr(line[:40])
                fail(f"{path}, line {number}", "an answer", got, "begin anew in another folder")
            yield row


def read_result(path: Path, *, texts: bool = False) -> EvalResult:
    """What a file of rows says, with questions in the order in which they came first.

    Args:
        path: an `answers.jsonl`.
        texts: keep the answers' texts, of each question the first; they are the bulk of the file.

    Raises:
        ValueError: there is no row, a cell lacks some of the questions, or some are not scored, or
            not as many times as the others.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        remedy = "name the folder that `roma eval` or `roma bench-vlm` wrote"
        got = f"none in {path.parent}"
        fail("results", f"a file {path.name}", got, remedy, error=FileNotFoundError)
    numbers: dict[str, int] = {}
    found: dict[Cell, _Column] = {}
    answers = 0
    for row in read_rows(path):
        answers = answers or len(row.correct)
        if not answers or len(row.correct) != answers:
            expected, got = f"{answers or 'some'} scored answers", str(len(row.correct))
            fail(f"{path}, question {row.id} at {row.cell}", expected, got, "score them first")
        column = found.setdefault(row.cell, _Column())
        column.put(numbers.setdefault(row.id, len(numbers)), row, texts=texts)
    missing = sum(len(numbers) - len(column.last) for column in found.values())
    if not numbers or missing:
        got = f"{missing} missing" if numbers else "none"
        fail(f"answers in {path}", "all", got, "run the same command again to complete them")
    return EvalResult(list(numbers), {cell: own.result(answers) for cell, own in found.items()})


@dataclass
class _Column:
    """The rows of a cell as they come, some bytes each."""

    last: dict[int, int] = field(default_factory=dict)  # number of the question → its newest row
    correct: "array[float]" = field(default_factory=lambda: array("d"))
    voted: list[float | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def put(self, number: int, row: Row, *, texts: bool) -> None:
        self.last[number] = len(self.voted)
        self.correct.extend(row.correct)
        self.voted.append(row.voted)
        if texts:
            self.texts.append(row.texts[0])

    def result(self, answers: int) -> CellResult:
        """The rows in the order of the questions; `answers` is how many each has."""
        order = [self.last[number] for number in range(len(self.last))]
        right = np.array(self.correct).reshape(-1, answers)[order]
        texts = [self.texts[row] for row in order] if self.texts else []
        if answers == 1:
            return CellResult(smallest(right[:, 0]), texts)
        voted = np.array(self.voted, dtype=np.float64)[order]
        return CellResult(right.mean(1), texts, smallest(right.max(1)), smallest(voted))


def _locked(folder: Path) -> TextIO:
    """The folder's lock, held by this process as long as the file is open, and not beyond its end.

    A file system without locks has none; `Record.add` looks once more.
    """
    file = (folder / _LOCK).open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        got, remedy = f"another that writes to {folder}", "let it end, or name another"
        fail("out", "a folder of one run at a time", got, remedy)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return file


def _hold(folder: Path, settings: Mapping[str, Any], rows: Path) -> None:
    """Writes the settings of a new folder, and holds an old one's to them."""
    path = folder / SETTINGS
    asked = json.loads(json.dumps(settings))  # as they are read: tuples are lists
    if not path.exists():
        if rows.exists():
            got = f"one with {rows.name} and no {SETTINGS}"
            fail("out", "a new folder, or one that was begun here", got, "name another")
        written = path.with_suffix(".new")
        with written.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)  # all of it or nothing
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        begun.keys()
    except (ValueError, AttributeError):
        fail(str(path), "what was asked, as JSON", "something else", "name another folder")
    for key in dict.fromkeys([*asked, *begun]):
        contents = asked.get(_CONTENTS.get(key, ""))
        same = contents is not None and contents == begun.get(_CONTENTS[key])
        if asked.get(key) != begun.get(key) and not same:
            got, remedy = _apart(key, begun.get(key), asked.get(key)), "name another, or overwrite"
            fail("out", "a new folder, or one begun with the same settings", got, remedy)


def _apart(key: str, there: Any, here: Any) -> str:
    """How two values of a setting differ; of conditions the first that does."""
    if key != "cells":
        return f"{key} = {there!r} there and {here!r} here"
    own, asked = (
        {_named(cell): cell.get("parameter") for cell in cells} for cells in (there, here)
    )
    for name in (*own, *asked):
        if name not in asked or name not in own:
            return f"{name} {'there' if name in own else 'here'} alone"
        if own[name] != asked[name]:
            return f"{name} = {own[name]!r} there and {asked[name]!r} here"
    return "the conditions in another order, or of another size"


def _named(cell: Mapping[str, Any]) -> str:
    return f"{cell['corruption']} L{cell['level']}" if cell["level"] else "clean"


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
