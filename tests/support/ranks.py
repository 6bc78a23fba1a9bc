"""Two processes of a group that outlive a test: importing torch costs more than most tests do."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 2


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
