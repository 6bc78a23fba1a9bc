"""Reads questions about images in EasyR1's columns: parquet, JSON lines, saved `datasets`."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import pyarrow as pa
import pyarrow.parquet as pq

from roma.data.example import Example, RowError, image_source, row_error
from roma_kernels.errors import fail

IMAGE_MARKER = "<image>"
# "train.parquet", "train-00000-of-00002.parquet" (the hub's shards), "train.jsonl"
_SPLIT_FILE = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<shards>\d{5}))?\.(parquet|jsonl)")


@dataclass(frozen=True)
class Columns:
    """Names of the columns. Only `solution` may be absent from the data."""

    images: str = "images"
    problem: str = "problem"
    answer: str = "answer"
    solution: str = "solution"


class Rows(Protocol):
    """A table read row by row."""

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class ArrowRows:
    """Rows of an Arrow table; a row is copied when it is read."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.column_names: list[str] = table.column_names

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._table.column(name)[index].as_py() for name in self.column_names}


class JsonRows:
    """Rows of JSON lines; a line is parsed when it is read. Blank lines are skipped."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = [line for line in lines if line.strip()]
        names: dict[str, None] = {}
        for index in range(len(self._lines)):
            try:
                names.update(dict.fromkeys(self[index]))
            except ValueError:  # reported with its index, or skipped, when the row is read
                continue
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[index])
        except ValueError as error:
            got = f"{self._lines[index][:40]!r} ({error})"
            fail("line", "a JSON object", got, "correct the line")
        if not isinstance(row, dict):
            fail("line", "a JSON object", type(row).__name__, "write one {...} per line")
        return row


class RomaDataset(Sequence[Example]):
    """A sequence of `Example`, checked when it is built; images are decoded later, on demand.

    Building it reads the text of every row, so that a bad row ends a run before its first step.
    `skip_broken=True` also decodes every image once, leaves broken rows out and lists them in
    `skipped`.

    Args:
        rows: the table; a `datasets.Dataset` is one too.
        name: what messages call it.
        columns: names of the columns. A column `id`, where there is one, names the rows; else their
            index does.
        image_dir: folder of relative image paths (None: the working directory).
        skip_broken: leave broken rows out instead of raising.

    Raises:
        ValueError: a column is missing, or no row is left.
        RowError: a row is broken and skip_broken is False.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        name: str = "dataset",
        columns: Columns | None = None,
        image_dir: str | Path | None = None,
        skip_broken: bool = False,
    ) -> None:
        self.name = name
        self.columns = columns or Columns()
        self.skipped: list[tuple[int, str]] = []
        self._rows = rows
        self._image_dir = None if image_dir is None else Path(image_dir)
        if not len(rows):
            fail(name, "at least one row", "none", "check the file, or how it was made")
        self._check_columns()
        self._kept: list[int] = []
        for index in range(len(rows)):
            try:
                example = self._read(index)
                if skip_broken:
                    example.load_images()
            except RowError as error:
                if not skip_broken:
                    raise
                self.skipped.append((index, str(error)))
            else:
                self._kept.append(index)
        if not self._kept:
            got = f"{len(rows)} broken ones"
            fail(name, "at least one usable row", got, f"the first is {self.skipped[0][1]}")

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """The example at a position among the usable rows; a slice gives a list."""
        if isinstance(index, slice):
            return [self._read(row) for row in self._kept[index]]
        return self._read(self._kept[index])

    def __repr__(self) -> str:
        return f"RomaDataset({self.name!r}, {len(self)} rows, {len(self.skipped)} skipped)"

    def _check_columns(self) -> None:
        found = self._rows.column_names
        for role in ("images", "problem", "answer"):
            wanted = getattr(self.columns, role)
            if wanted not in found:
                near = difflib.get_close_matches(wanted, found, n=1, cutoff=0.5)
                guess = f"did you mean '{near[0]}'? " if near else ""
                remedy = f"{guess}rename the column, or name it with Columns({role}=...)"
                fail(self.name, f"a column '{wanted}'", f"the columns {found}", remedy)

    def _read(self, index: int) -> Example:
        origin = f"{self.name}, row {index}"
        try:
            return self._example(self._rows[index], index, origin)
        except ValueError as error:
            raise row_error(origin, error) from error

    def _example(self, row: Mapping[str, Any], index: int, origin: str) -> Example:
        names = self.columns
        cell = row.get(names.images)
        cells = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
        images = tuple(image_source(value, self._image_dir) for value in cells)
        problem = row.get(names.problem)
        if not isinstance(problem, str):
            fail(names.problem, "text", repr(problem)[:60], "write the question there")
        markers = problem.count(IMAGE_MARKER)
        if not images:
            fail(names.images, "at least one image", "none", "roma needs one to degrade: add it")
        if markers != len(images):
            expected = f"{IMAGE_MARKER} {len(images)} times, as there are images"
            fail(names.problem, expected, f"it {markers} times", "write it once per image")
        for image in images:
            if isinstance(image, Path) and not image.is_file():
                remedy = "correct the path, or image_dir"
                fail(names.images, "an image file", f"no file at {image}", remedy)
        solution, row_id = row.get(names.solution), row.get("id")
        return Example(
            id=str(index if row_id is None else row_id),
            images=images,
            problem=problem,
            answer=_answer_text(names.answer, row.get(names.answer)),
            solution=None if solution is None else str(solution),
            origin=origin,
        )


def load_dataset_rows(
    path: str | Path,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    image_dir: str | Path | None = None,
    skip_broken: bool = False,
) -> RomaDataset:
    """Opens a dataset of questions about images.

    Args:
        path: a .parquet or .jsonl file; a folder that `datasets` saved (`save_to_disk`); or a
            folder that holds one such file, set of shards or saved dataset per split, directly or
            in its `data/`. `path@split` is the same as `split=`. Parquet and JSON lines are kept in
            memory, images still encoded; a saved dataset is mapped from disk.
        split: the split of a folder; may be omitted if there is only one.
        columns: names of the columns: images (a list of {bytes, path}, or of paths), problem,
            answer.
        image_dir: folder of relative image paths; None: the folder of the file.
        skip_broken: leave out rows that cannot be used and list them in `skipped`; decodes every
            image once.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: unknown kind of file, unknown split, missing column, empty dataset.
        RowError: a broken row, unless skip_broken.

    Example:
        >>> from tempfile import TemporaryDirectory; from roma.data import write_digits
        >>> with TemporaryDirectory() as folder:
        ...     paths = write_digits(folder, train=2, val=0, test=0)
        ...     example = load_dataset_rows(folder, split="train")[1]
        >>> example.id, example.load_images()[0].shape
        ('1', (32, 64, 3))
    """
    text = str(path)
    if split is None and "@" in Path(text).name and not Path(text).exists():
        text, split = text.rsplit("@", 1)
    files = _find_files(Path(text).expanduser(), split)
    folder = files[0] if files[0].is_dir() else files[0].parent
    name = text if split is None else f"{text}@{split}"
    image_dir = image_dir or folder
    return RomaDataset(
        _open(files), name=name, columns=columns, image_dir=image_dir, skip_broken=skip_broken
    )


def _find_files(root: Path, split: str | None) -> list[Path]:
    """The files of a split, or the saved dataset that it is."""
    if not root.exists():
        got = f"nothing at {root}"
        remedy = "check the path; fetch one of the hub with hf download NAME --repo-type dataset"
        fail("path", "a dataset file or folder", got, remedy, error=FileNotFoundError)
    if root.is_file() or _is_saved_dataset(root):
        if split is not None:
            expected = f"None, as {root} is one split"
            fail("split", expected, repr(split), "leave it out, or give the folder above")
        return [root]
    splits = _splits_of(root)
    if not splits:
        expected = "a .parquet file, a .jsonl file or a folder of them"
        fail("path", expected, f"{root} with none", "check the path")
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        near = difflib.get_close_matches(str(split), splits, n=1, cutoff=0.4)
        guess = f"did you mean '{near[0]}'?" if near else "choose one of them with split="
        fail("split", f"one of {sorted(splits)} in {root}", repr(split), guess)
    return splits[split]


def _splits_of(root: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    shards: dict[str, set[int]] = {}
    for entry in sorted([*root.iterdir(), *root.glob("data/*")]):
        match = _SPLIT_FILE.fullmatch(entry.name) if entry.is_file() else None
        if match or _is_saved_dataset(entry):
            split = match["split"] if match else entry.name
            splits.setdefault(split, []).append(entry)
            shards.setdefault(split, set()).add(int(match["shards"] or 1) if match else 1)
    for split, files in splits.items():
        if shards[split] != {len(files)}:
            got = ", ".join(file.name for file in files)
            expected = "one file, or all shards of one set"
            fail(f"split '{split}'", expected, got, "remove the odd ones, or fetch the rest")
    return splits


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _open(files: Sequence[Path]) -> Rows:
    if files[0].is_dir():
        from datasets import load_from_disk  # takes a second to import

        return ArrowRows(load_from_disk(str(files[0])).with_format("arrow")[:])
    if files[0].suffix == ".parquet":
        try:
            return ArrowRows(pa.concat_tables(pq.read_table(file) for file in files))
        except pa.ArrowInvalid as error:
            got = f"{files[0]} ({error})"
            fail("path", "parquet files with the same columns", got, "make or fetch them again")
    if files[0].suffix == ".jsonl":
        return JsonRows(line for file in files for line in file.read_bytes().splitlines())
    fail("path", "a .parquet or .jsonl file, or a dataset folder", str(files[0]), "convert it")


def _answer_text(name: str, value: object) -> str:
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        text = str(value).strip()
        if text:
            return text
    fail(name, "text or a number that is not empty", repr(value)[:60], "write the answer there")
