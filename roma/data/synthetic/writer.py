"""Writes generated questions: parquet, JSON lines with PNG files, or a saved `datasets` folder."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from roma_kernels.errors import fail

SPLITS = ("train", "val", "test")
FORMATS = ("parquet", "jsonl", "hf")
_CHUNK = 1000  # rows of a parquet row group

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` stores an image
_SCHEMA = pa.schema(
    [
        ("images", pa.list_(_IMAGE)),
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("solution", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Question:
    """A generated question; the image is [H, W, 3] uint8, the problem holds one `<image>`."""

    image: NDArray[np.uint8]
    problem: str
    answer: str
    solution: str

    def png(self) -> bytes:
        """The image as a PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, "PNG")
        return buffer.getvalue()


# Makes the first questions of a split from (split, size, seed=); size does not change question i.
Source = Callable[..., Iterator[Question]]

Progress = Callable[[str, int, int], None]
"""Called from time to time, and at the end, with a split, the rows made of it, and its size."""


def question_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random generator of one question.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        fail("split", " or ".join(SPLITS), repr(split), "choose one of them")
    return np.random.default_rng((seed, SPLITS.index(split), index))


def write_splits(
    out: str | Path,
    source: Source,
    *,
    sizes: dict[str, int],
    seed: int,
    format: str,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Writes each split below `out` and returns where each one is.

    A file appears under its name only when it is whole. The columns are images, problem, answer and
    solution.

    Args:
        out: a folder; made if it does not exist.
        source: makes the questions.
        sizes: rows per split; 0 leaves a split out.
        seed: of the questions.
        format: "parquet" (SPLIT.parquet, PNG bytes inside), "jsonl" (SPLIT.jsonl and
            SPLIT_images/*.png) or "hf" (what `datasets.DatasetDict.save_to_disk` writes; needs
            `datasets`).
        overwrite: replace splits that `out` holds; False: that is an error.
        progress: called with the progress of each split.

    Raises:
        ValueError: a negative size, all sizes 0, a negative seed, or an unknown format.
        FileExistsError: `out` holds such a split and `overwrite` is false; nothing is written.
    """
    if format not in FORMATS:
        fail("format", " or ".join(FORMATS), repr(format), "choose one of them")
    if seed < 0:
        fail("seed", "0 or more", str(seed), "choose another")
    if min(sizes.values()) < 0 or not any(sizes.values()):
        fail("sizes", "0 or more rows of each split, not all 0", str(sizes), "ask for some rows")
    out, ending = Path(out), "" if format == "hf" else f".{format}"
    paths = {split: out / f"{split}{ending}" for split, size in sizes.items() if size}
    # `datasets` lists the splits of a folder in one file, which another split would replace.
    for path in (*paths.values(), *([out / "dataset_dict.json"] if format == "hf" else [])):
        if path.exists() and not overwrite:
            expected = "a folder without this set"
            remedy = "choose another, or overwrite it: --overwrite, overwrite=True"
            fail("out", expected, str(path), remedy, error=FileExistsError)
    out.mkdir(parents=True, exist_ok=True)
    splits = {
        split: _counted(source(split, sizes[split], seed=seed), split, sizes[split], progress)
        for split in paths
    }
    if format == "hf":
        _write_saved(out, splits)
        return paths
    write = _write_parquet if format == "parquet" else _write_jsonl
    for split, questions in splits.items():
        part = paths[split].with_suffix(".part")
        write(part, split, questions)
        os.replace(part, paths[split])
    return paths


def _counted(
    questions: Iterator[Question], split: str, size: int, progress: Progress | None
) -> Iterator[Question]:
    """The same questions; `progress` is told of every hundredth and of the last one."""
    for done, question in enumerate(questions, 1):
        yield question
        if progress and (done % 100 == 0 or done == size):
            progress(split, done, size)


def _rows(questions: Iterator[Question]) -> list[dict[str, Any]]:
    return [
        {
            "images": [{"bytes": question.png(), "path": None}],
            "problem": question.problem,
            "answer": question.answer,
            "solution": question.solution,
        }
        for question in questions
    ]


def _write_parquet(path: Path, split: str, questions: Iterator[Question]) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        while rows := _rows(islice(questions, _CHUNK)):
            writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))


def _write_jsonl(path: Path, split: str, questions: Iterator[Question]) -> None:
    folder = path.parent / f"{split}_images"
    folder.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            image = folder / f"{index:06}.png"
            image.write_bytes(question.png())
            row = {
                "images": [f"{folder.name}/{image.name}"],
                "problem": question.problem,
                "answer": question.answer,
                "solution": question.solution,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_saved(out: Path, splits: dict[str, Iterator[Question]]) -> None:
    # Takes a second to import, and only this form needs it.
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    text = Value("string")
    features = Features(images=List(Image()), problem=text, answer=text, solution=text)
    data = {
        split: Dataset.from_list(_rows(questions), features=features)
        for split, questions in splits.items()
    }
    DatasetDict(data).save_to_disk(str(out))
