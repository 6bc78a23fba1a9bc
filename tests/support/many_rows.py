"""Writes a parquet file of many small images, opens it as a run does, and prints what it costs.

    python tests/support/many_rows.py 1000000

A line of JSON: rows, mebibytes of the file, seconds of opening it (all text is checked), of a
further pass over it, milliseconds of a row in random order, and by how many mebibytes the resident
memory grew after each, from what it was with everything imported and a file of ten rows open.
"""

import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from roma.data import RomaDataset
from roma.data.rows import CACHE_BYTES, ParquetRows

GROUP = 1000


def write(path: Path, rows: int) -> None:
    """Rows of a one-kilobyte image each, a thousand to a row group."""
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    names = {"images": kind, "problem": pa.string(), "answer": pa.string()}
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema(names)) as writer:
        for start in range(0, rows, GROUP):
            some = range(start, min(start + GROUP, rows))
            images = [[{"bytes": rng.bytes(1024), "path": f"{i}.png"}] for i in some]
            problems = [f"<image> What is the {i}th number in this picture?" for i in some]
            answers = [str(i) for i in some]
            columns = [pa.array(images, kind), pa.array(problems), pa.array(answers)]
            writer.write_table(pa.table(columns, schema=pa.schema(names)))


def resident() -> float:
    """Of this process, MiB."""
    return psutil.Process().memory_info().rss / 2**20


def main(rows: int, cache_bytes: int) -> None:
    """Measures and prints."""
    with TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.parquet", Path(folder) / "large.parquet"
        write(small, 10)
        _ = RomaDataset(ParquetRows([small]))[0]
        write(large, rows)
        before, begin = resident(), time.perf_counter()
        data = RomaDataset(ParquetRows([large], cache_bytes=cache_bytes))
        opened, grown = time.perf_counter() - begin, [resident() - before]
        begin = time.perf_counter()
        for example in data:
            assert example.images
        passed = time.perf_counter() - begin
        grown.append(resident() - before)
        order = random.Random(0).sample(range(rows), min(2000, rows))
        begin = time.perf_counter()
        for index in order:
            assert data[index].answer == str(index)
        drawn = (time.perf_counter() - begin) / len(order)
        grown.append(resident() - before)
        found = {
            "rows": rows,
            "file_mib": large.stat().st_size / 2**20,
            "open_s": opened,
            "pass_s": passed,
            "random_row_ms": 1000 * drawn,
            "grown_mib": grown,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else CACHE_BYTES)
