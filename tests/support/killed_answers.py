"""Records of answers that are killed and go on: a process that forks, and imports no model."""

import hashlib
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from roma.data import Example
from roma.evaluate.answers import Answer
from roma.evaluate.conditions import Cell, DegradedImages
from roma.evaluate.record import Record
from roma.evaluate.stream import answer_all, unit_of

CELLS = [Cell(), Cell("masking", "patch_mask", 1), Cell("masking", "patch_mask", 2)]
COUNT, BATCH = 100, 7


class Asked(Sequence[Any]):
    """Questions made when they are read, as a dataset of files has them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.count))]
        gray = Image.fromarray(np.full((16, 32, 3), at % 256, dtype=np.uint8))
        return Example(f"q{at}", (gray,), "<image> how bright ?", str(at))


def say(problems: Any, images: Any, *, seed: int) -> list[list[Answer]]:
    """Two answers a question, of any length, that depend on pixels, seed and place in the batch."""
    found = []
    for place, (image,) in enumerate(images):
        key = f"{seed} {place} {len(images)}".encode()
        digest = hashlib.sha256(image.tobytes() + key).hexdigest()
        found.append([Answer(digest[: 1 + int(digest[k], 16)] + "ä\n", 1) for k in (0, 1)])
    return found


def score(rows: Any) -> list[dict[str, float]]:
    """Right: an even length."""
    return [{"accuracy": float(len(row["response"]) % 2 == 0)} for row in rows]


def answer(folder: Path, asked: Sequence[Any] | None = None) -> Record:
    """Answers what is not there."""
    record = Record(folder, {"seed": 3})
    answer_all(
        record,
        asked if asked is not None else Asked(COUNT),
        [unit_of(cell, say, seed=3) for cell in CELLS],
        count=COUNT,
        images=lambda some: DegradedImages(some, CELLS, seed=3, keep=False),
        batch_size=BATCH,
        score=score,
    )
    return record


def die_at(sync: int, share: float, path: Path) -> None:
    """Kills this process at its `sync`-th fsync; a share of what it added is on the disk then."""
    plain, seen = os.fsync, [0]
    before = [path.stat().st_size if path.exists() else 0]

    def deadly(file: int) -> None:
        seen[0] += 1
        size = os.fstat(file).st_size
        if seen[0] == sync:
            os.ftruncate(file, before[0] + int(share * (size - before[0])))
            os.kill(os.getpid(), signal.SIGKILL)
        plain(file)
        before[0] = path.stat().st_size if path.exists() else 0

    os.fsync = deadly


def main(folder: Path, kills: int, seed: int) -> None:
    """Kills a run in `folder` so many times, then lets it end; prints how many rows each left."""
    drawn, path = random.Random(seed), folder / "answers.jsonl"
    for turn in range(kills + 1):
        sync, share = drawn.randint(1, 6), drawn.random()
        child = os.fork()
        if not child:
            if turn < kills:
                die_at(sync, share, path)
            answer(folder)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) == (turn < kills), (turn, status)
        print(path.read_bytes().count(b"\n") if path.exists() else 0)


if __name__ == "__main__":
    import sys

    for name, kills in (("cut", 10), ("whole", 0)):
        main(Path(sys.argv[1]) / name, kills, seed=5)
