"""Tables read row by row, without being held in memory: parquet, Arrow and JSON lines."""

import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roma_kernels.errors import fail

PRESENT = b"an image"
"""What stands for the bytes of an image in a row that is only checked."""

CACHE_BYTES = 256 * 2**20
_BATCH = 4096  # rows that are Python objects at a time while a table is checked


class Rows(Protocol):
    """A table read row by row."""

    @property
    def column_names(self) -> list[str]:
        """The names of the columns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class ArrowRows:
    """Rows of an Arrow table, which may be mapped from disk; a row is copied when it is read."""

    def __init__(self, table: pa.Table, *, images: str = "") -> None:
        self._table, self._images = table, images
        self.column_names: list[str] = table.column_names

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: self._table.column(name)[index].as_py() for name in self._table.column_names}

    def only(self, names: Sequence[str], images: str) -> "ArrowRows":
        """The same rows without other columns; `images` is that of the images."""
        return ArrowRows(self._table.select(list(names)), images=images)

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """All rows; where an image has bytes, PRESENT stands for them."""
        for batch in self._table.to_batches(max_chunksize=_BATCH):
            yield from _light(batch, self._images)


class ParquetRows:
    """Rows of parquet files; a row group is read when a row of it is, and the last ones are kept.

    Checking all rows reads the text, and of images stored as {bytes, path} not the bytes: the
    number of those that are missing stands in the file's statistics.

    Args:
        files: with the same columns.
        cache_bytes: of the row groups that are kept, at least the last one read.

    Raises:
        ValueError: not parquet, or other columns than in the first file.
    """

    def __init__(self, files: Sequence[Path], *, cache_bytes: int = CACHE_BYTES) -> None:
        """Reads the files' footers."""
        self._files, self._cache_bytes = list(files), cache_bytes
        self._meta: list[Any] = []
        self._groups: list[tuple[int, int]] = []  # file, row group within it
        self._starts = array("q", [0])
        schema = None
        for number, file in enumerate(files):
            try:
                meta = pq.read_metadata(file)
                own = meta.schema.to_arrow_schema().remove_metadata()
            except (pa.ArrowException, OSError) as error:
                _unreadable(file, error)
            schema = schema or own
            if own != schema:
                got = f"{file} with {_columns(own)}, and {files[0]} with {_columns(schema)}"
                fail("path", "parquet files with the same columns", got, "make or fetch them again")
            self._meta.append(meta)
            for group in range(meta.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._starts[-1] + meta.row_group(group).num_rows)
        assert schema is not None  # there is a file
        self.column_names: list[str] = schema.names
        self._images = ""
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._starts, index) - 1
        row: dict[str, Any] = self._read(group).slice(index - self._starts[group], 1).to_pylist()[0]
        return row

    def only(self, names: Sequence[str], images: str) -> "ParquetRows":
        """The same rows without other columns; `images` is that of the images."""
        made = copy(self)
        made.column_names, made._images = list(names), images
        made._kept, made._lock = OrderedDict(), Lock()
        return made

    def scan(self) -> Iterator[Mapping[str, Any]]:
        """All rows; where an image has bytes, PRESENT stands for them."""
        for number, group in self._groups:
            leaves = [] if self._stores_bytes(number, group) else self._beside_bytes(number)
            try:
                yield from self._scan(number, group, leaves)
            except (pa.ArrowException, OSError) as error:
                _unreadable(self._files[number], error)

    def _read(self, group: int) -> pa.Table:
        """A row group, from memory if it was read of late."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            number, own = self._groups[group]
            try:
                with self._open(number) as file:
                    table = file.read_row_group(own, columns=self.column_names)
            except (pa.ArrowException, OSError) as error:
                _unreadable(self._files[number], error)
            self._kept[group] = table
            while len(self._kept) > 1 and self._held() > self._cache_bytes:
                self._kept.popitem(last=False)
            return table

    def _held(self) -> int:
        return sum(table.nbytes for table in self._kept.values())

    def _open(self, number: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._files[number], metadata=self._meta[number])

    def _scan(self, number: int, group: int, leaves: list[str]) -> Iterator[Mapping[str, Any]]:
        names = self.column_names
        columns = [name for name in names if name != self._images] + leaves
        read = {"row_groups": [group], "columns": columns if leaves else names}
        with self._open(number) as file:
            for batch in file.iter_batches(batch_size=_BATCH, **read):
                for row in _light(batch, self._images):
                    if leaves:
                        row[self._images] = _with_bytes(row[self._images])
                    yield row

    def _beside_bytes(self, number: int) -> list[str]:
        """The leaves of the images' column without that of the bytes; none: they have no other."""
        schema = self._meta[number].schema
        paths = [schema.column(i).path for i in range(len(schema))]
        own = [path for path in paths if path.split(".")[0] == self._images]
        others = [path for path in own if not path.endswith(".bytes")]
        return others if len(others) == len(own) - 1 else []

    def _stores_bytes(self, number: int, group: int) -> bool:
        """Whether the bytes must be read to know which images have some."""
        leaves = self._beside_bytes(number)
        meta = self._meta[number].row_group(group)
        chunks = [meta.column(i) for i in range(meta.num_columns)]
        nulls = {
            chunk.path_in_schema: chunk.statistics.null_count
            for chunk in chunks
            if chunk.statistics is not None and chunk.statistics.has_null_count
        }
        missing = [n for path, n in nulls.items() if path in _bytes_of(leaves)]
        if not leaves or not missing:
            return True
        if missing[0] == 0:
            return False
        # Rows without an image count as missing, too.
        without = 0
        with self._open(number) as file:
            for batch in file.iter_batches(row_groups=[group], columns=leaves):
                for cell in batch.column(0).to_pylist():
                    cells = cell if isinstance(cell, list) else [cell]
                    without += sum(one is None for one in cells) or not cells
        return bool(missing[0] != without)


class JsonRows:
    """Rows of JSON lines; a line is read and parsed when it is asked for. Blank ones are skipped.

    Args:
        files: in their order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Goes through the files for the places of their lines and the names in them."""
        self._files = [open(file, "rb", buffering=0) for file in files]
        self._numbers, self._starts, self._sizes = array("i"), array("q"), array("q")
        names: dict[str, None] = {}
        for number, file in enumerate(files):
            start = 0
            with open(file, "rb") as lines:
                for line in lines:
                    if line.strip():
                        self._numbers.append(number)
                        self._starts.append(start)
                        self._sizes.append(len(line))
                        try:
                            names.update(dict.fromkeys(_parsed(line)))
                        except ValueError:  # reported with its index, or skipped, when it is read
                            pass
                    start += len(line)
        self.column_names = list(names)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        descriptor = self._files[self._numbers[index]].fileno()
        return _parsed(os.pread(descriptor, self._sizes[index], self._starts[index]))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        got = f"{line[:40]!r} ({error})"
        fail("line", "a JSON object", got, "correct the line")
    if not isinstance(row, dict):
        fail("line", "a JSON object", type(row).__name__, "write one {...} per line")
    return row


def _light(batch: pa.RecordBatch, images: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch, with PRESENT for the bytes of images."""
    names = batch.schema.names
    columns = [
        _cells(batch.column(name)) if name == images else batch.column(name).to_pylist()
        for name in names
    ]
    for cells in zip(*columns, strict=True):
        yield dict(zip(names, cells, strict=True))


def _cells(values: pa.Array) -> list[Any]:
    """An array as Python objects, with PRESENT for binary values: these are not touched."""
    kind = values.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [PRESENT if there else None for there in values.is_valid().to_pylist()]
    there = values.is_valid().to_pylist()
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [_cells(column) for column in values.flatten()]
        rows = zip(*columns, strict=True) if columns else iter([()] * len(values))
        return [
            dict(zip(names, row, strict=True)) if valid else None
            for row, valid in zip(rows, there, strict=True)
        ]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = iter(_cells(values.flatten()))
        lengths = pc.list_value_length(values).to_pylist()
        return [
            [next(inner) for _ in range(length or 0)] if valid else None
            for length, valid in zip(lengths, there, strict=True)
        ]
    found: list[Any] = values.to_pylist()
    return found


def _bytes_of(leaves: Sequence[str]) -> set[str]:
    """The path of the bytes beside leaves like images.list.element.path."""
    return {f"{leaf.rpartition('.')[0]}.bytes" for leaf in leaves}


def _with_bytes(cell: Any) -> Any:
    """A cell that was read without its bytes, all of which are there."""
    if isinstance(cell, list):
        return [_with_bytes(one) for one in cell]
    return None if cell is None else {**cell, "bytes": PRESENT}


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _unreadable(file: Path, error: Exception) -> NoReturn:
    got = f"{file} ({' '.join(str(error).split())[:200]})"
    fail("path", "parquet files that can be read", got, "make or fetch it again")
