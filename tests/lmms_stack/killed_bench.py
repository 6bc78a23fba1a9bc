"""Runs of `roma bench-vlm` that are killed and go on, forked from a process with all imports."""

import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import lmms_eval.models.chat.qwen3_vl
import lmms_eval.tasks  # noqa: F401  # what takes seconds
from rich.console import Console

import roma.evaluate.lmms_eval.model
import roma.evaluate.report.write  # noqa: F401
from roma.evaluate.lmms_eval.asked import Asked
from roma.evaluate.lmms_eval.run import run_bench


def asked(suite: Path, *, judge: str = "none") -> Asked:
    """Six questions of seven benchmarks at five conditions, four and two at a time."""
    return Asked(
        suite / "model",
        suite="paper",
        include_path=suite / "tasks",
        pools=["clean", "seen"],
        levels=[3],
        max_tokens=8,
        batch_size=4,
        judge=judge,
    )


def die_at(sync: int, cut: int) -> None:
    """Kills this process at its `sync`-th fsync; the last `cut` bytes do not come to the disk."""
    plain, seen = os.fsync, [0]

    def deadly(file: int) -> None:
        seen[0] += 1
        if seen[0] == sync:
            os.ftruncate(file, max(0, os.fstat(file).st_size - cut))  # a line has more than 100
            os.kill(os.getpid(), signal.SIGKILL)
        plain(file)

    os.fsync = deadly


def lines(folder: Path) -> int:
    """Rows on disk, of answers and of scores."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/*.jsonl"))


def main(suite: Path, folder: Path, kills: int) -> None:
    """Kills a run so many times, then lets it end; prints how many rows each start left."""
    drawn = random.Random(5)
    for turn in range(kills + 1):
        sync, cut, rows = drawn.randint(1, 4), drawn.randrange(80), drawn.randint(-20, 0)
        child = os.fork()
        if not child:
            if turn < kills and turn % 2:
                die_at(sync, cut)
            run_bench(asked(suite), folder, console=Console(file=io.StringIO()))
            os._exit(0)
        if turn < kills and not turn % 2:
            while lines(folder) < 50 + 22 * turn + rows:  # 210 answers, then 210 scores
                time.sleep(0.005)
            time.sleep(drawn.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) == (turn < kills), (turn, status)
        print(lines(folder), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
