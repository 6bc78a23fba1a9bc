"""Reads questions about images in EasyR1's columns: parquet, JSON lines, saved `datasets`."""

import dataclasses
import difflib
import math
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from roma.data.example import Example, RowError, image_source, row_error
from roma.data.prompt import read_format
from roma.data.rows import ArrowRows, JsonRows, ParquetRows, Rows
from roma_kernels.errors import fail

IMAGE_MARKER, VIDEO_MARKER = "<image>", "<video>"
# "train.parquet", "train-00000-of-00002.parquet" (the hub's shards), "train.jsonl"
_SPLIT_FILE = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<shards>\d{5}))?\.(parquet|jsonl)")
_VIDEOS = ("videos", "video")
# What public datasets call a column: ViRL39K and MMK12 (docs/DATA.md).
_ALSO = {"images": "image", "problem": "question", "id": "qid"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns. Only `solution` and `id` may be absent from the data.

    A column that has its default name here and is absent is looked for as `image`, `question` or
    `qid`.
    """

    images: str = "images"
    problem: str = "problem"
    answer: str = "answer"
    solution: str = "solution"
    id: str = "id"

    def found_in(self, names: Sequence[str]) -> "Columns":
        """The same with the other name of each column that is absent and has one."""
        other = {
            role: also
            for role, also in _ALSO.items()
            if getattr(self, role) == role and role not in names and also in names
        }
        return dataclasses.replace(self, **other)


class RomaDataset(Sequence[Example]):
    """A sequence of `Example`, checked when it is built; images are read later, on demand.

    Building it reads the text of every row, so that a bad row ends a run before its first step. A
    row has as many images as its problem has `<image>`, or none: a question of text alone. Videos
    are refused. `skip_broken=True` also decodes every image once, leaves broken rows out and lists
    them in `skipped`.

    Args:
        rows: the table; a `datasets.Dataset` is one too.
        name: what messages call it.
        columns: names of the columns. A column `id`, where there is one, names the rows; else their
            index does. The names that were found are in `columns` afterwards.
        image_dir: folder of relative image paths (None: the working directory).
        skip_broken: leave broken rows out instead of raising.
        format: makes the prompt's text of a problem.

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
        format: Callable[[str], str] | None = None,
    ) -> None:
        self.name = name
        self.columns = (columns or Columns()).found_in(rows.column_names)
        self.skipped: list[tuple[int, str]] = []
        self._rows: Rows = rows
        self._image_dir = None if image_dir is None else Path(image_dir)
        self._format = format
        if not len(rows):
            fail(name, "at least one row", "none", "check the file, or how it was made")
        self._check_columns()
        kept = array("q")  # eight bytes a row, where a list takes forty
        for index, found in enumerate(self._checked(skip_broken)):
            if isinstance(found, RowError):
                if not skip_broken:
                    raise found
                self.skipped.append((index, str(found)))
            else:
                kept.append(index)
        self._kept: Sequence[int] = kept if self.skipped else range(len(rows))
        if not self._kept:
            got = f"{len(rows)} broken ones"
            fail(name, "at least one usable row", got, f"the first is {self.skipped[0][1]}")

    def _checked(self, decode: bool) -> Iterator[Example | RowError]:
        """Every row, or what is wrong with it."""
        if not decode and isinstance(self._rows, ArrowRows | ParquetRows):
            for index, row in enumerate(self._rows.scan()):
                try:
                    yield self._example(row, index)
                except RowError as error:
                    yield error
            return
        for index in range(len(self._rows)):
            try:
                example = self._read(index)
                if decode:
                    example.load_images()
            except RowError as error:
                yield error
            else:
                yield example

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

        if isinstance(self._rows, ArrowRows | ParquetRows):
            names = [*dataclasses.astuple(self.columns), *_VIDEOS]
            self._rows = self._rows.only(
                [name for name in found if name in names], self.columns.images
            )

    def _read(self, index: int) -> Example:
        try:
            row = self._rows[index]
        except ValueError as error:
            raise row_error(f"{self.name}, row {index}", error) from error
        return self._example(row, index)

    def _example(self, row: Mapping[str, Any], index: int) -> Example:
        origin = f"{self.name}, row {index}"
        try:
            return self._made(row, index, origin)
        except ValueError as error:
            raise row_error(origin, error) from error

    def _made(self, row: Mapping[str, Any], index: int, origin: str) -> Example:
        names = self.columns
        cell = row.get(names.images)
        cells = cell if isinstance(cell, list | tuple) else [] if cell is None else [cell]
        images = tuple(image_source(value, self._image_dir) for value in cells)
        question = row.get(names.problem)
        if not isinstance(question, str):
            fail(names.problem, "text", repr(question)[:60], "write the question there")
        problem = self._format(question) if self._format else question
        for name in _VIDEOS:
            if row.get(name):
                fail(name, "no video", "one", "roma degrades images alone: leave the row out")
        if VIDEO_MARKER in problem:
            remedy = "roma degrades images alone: leave the row out"
            fail(names.problem, f"no {VIDEO_MARKER}", "one", remedy)
        markers = problem.count(IMAGE_MARKER)
        if markers != len(images):
            expected = f"{IMAGE_MARKER} {len(images)} times, as there are images"
            fail(names.problem, expected, f"it {markers} times", "write it once per image")
        for image in images:
            if isinstance(image, Path) and not image.is_file():
                remedy = "correct the path, or image_dir"
                fail(names.images, "an image file", f"no file at {image}", remedy)
        solution, row_id = row.get(names.solution), row.get(names.id)
        return Example(
            id=str(index if row_id is None else row_id),
            images=images,
            problem=problem,
            answer=_answer_text(names.answer, row.get(names.answer)),
            solution=None if solution is None else str(solution),
            origin=origin,
            question=question,
        )


def load_dataset_rows(
    path: str | Path,
    *,
    split: str | None = None,
    columns: Columns | None = None,
    image_dir: str | Path | None = None,
    skip_broken: bool = False,
    format_prompt: str | Path | None = None,
) -> RomaDataset:
    """Opens a dataset of questions about images.

    Args:
        path: a .parquet or .jsonl file; a folder that `datasets` saved (`save_to_disk`); or a
            folder that holds one such file, set of shards or saved dataset per split, directly or
            in its `data/`. `path@split` is the same as `split=`. Nothing is held in memory but what
            was read last: row groups of parquet, lines of JSON; a saved dataset is mapped.
        split: the split of a folder; may be omitted if there is only one.
        columns: names of the columns: images (a list of {bytes, path}, or of paths), problem,
            answer.
        image_dir: folder of relative image paths; None: the folder of the file.
        skip_broken: leave out rows that cannot be used and list them in `skipped`; decodes every
            image once.
        format_prompt: file of a jinja template that makes the prompt's text, as EasyR1 has them;
            `content` in it is the problem.

    Raises:
        FileNotFoundError: nothing is at `path`, or no template at `format_prompt`.
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
        _open(files),
        name=name,
        columns=columns,
        image_dir=image_dir,
        skip_broken=skip_broken,
        format=None if format_prompt is None else read_format(format_prompt),
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
        guess = f"did you mean '{near[0]}'?" if near else "name one: PATH@SPLIT, or split="
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
        return ParquetRows(files)
    if files[0].suffix == ".jsonl":
        return JsonRows(files)
    fail("path", "a .parquet or .jsonl file, or a dataset folder", str(files[0]), "convert it")


def _answer_text(name: str, value: object) -> str:
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        text = str(value).strip()
        if text:
            return text
    fail(name, "text or a number that is not empty", repr(value)[:60], "write the answer there")
