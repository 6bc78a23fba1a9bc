"""Two processes of a group that outlive a test: importing torch costs more than most tests do."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import zlib
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def join(rank: int, store: Path, timeout: float) -> None:
    """A group of gloo for the process of a rank, which waits `timeout` seconds for the other."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    # DeepSpeed's shared memory is named by it: another test's may still be there.
    os.environ["MASTER_PORT"] = str(zlib.crc32(str(store).encode()))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=timeout),
    )


def leave() -> None:
    """Ends it. A rank that goes while the other still listens takes it down, now and then."""
    dist.barrier()
    dist.destroy_process_group()


def _serve(rank: int, tasks: Connection) -> None:
    """Run what comes, and say what became of it: None, or a traceback."""
    while True:
        function, args = tasks.recv()
        try:
            function(rank, *args)
        except BaseException:
            tasks.send(traceback.format_exc())
            raise
        tasks.send(None)


class Ranks:
    """Runs functions of a rank on both, as torch.multiprocessing.spawn does.

    Args:
        limit: seconds that a function may take; ranks that wait for each other fail then.
    """

    def __init__(self, limit: float = 300.0) -> None:
        self.limit = limit
        self._running: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """`function(rank, *args)` on each rank; what one raises ends both, and the test."""
        if not self._running:
            self._start()
        for _, tasks in self._running:
            tasks.send((function, args))
        waiting = [tasks for _, tasks in self._running]
        end = time.monotonic() + self.limit
        while waiting:
            ready = wait(waiting, timeout=max(end - time.monotonic(), 0.0))
            if not ready:
                self.stop()
                raise AssertionError(f"{len(waiting)} ranks were not done after {self.limit:g} s")
            for tasks in ready:
                try:
                    said = tasks.recv()
                except EOFError:
                    said = "a rank ended without a word"
                if said is not None:
                    self.stop()
                    raise AssertionError(said)
                waiting.remove(tasks)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            tasks, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, tasks))

    def stop(self) -> None:
        """End both; the next function starts new ones."""
        for process, tasks in self._running:
            process.terminate()
            process.join()
            tasks.close()
        self._running.clear()
