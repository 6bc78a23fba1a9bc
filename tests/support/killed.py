"""Processes to be killed: forked from one that has imported everything, and does nothing else.

A fork of the tests' own process would take their threads' locks along, and no thread to release
them; to import torch anew takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import small_model
from support.small_run import config
from support.tiny_run import TinyRun

from roma.train.trainer import Trainer

# Of Python's audit events those that change a run folder.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Clean:
    """A process without threads, in which functions may call `forked`.

    Args:
        limit: seconds that a function may take.
    """

    def __init__(self, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._limit = limit
        self._tasks, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """`function(*args)` there.

        Raises:
            AssertionError: with what the function raised.
        """
        self._tasks.send((function, args))
        assert self._tasks.poll(self._limit), f"not done after {self._limit:g} s"
        failed = self._tasks.recv()
        assert failed is None, failed

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.join()


def _serve(tasks: Connection) -> None:
    import nvidia.dali.experimental.dynamic  # noqa: F401  # what each run would import, for half a second

    torch.set_num_threads(1)
    small_model.folder()
    while True:
        function, args = tasks.recv()
        try:
            function(*args)
        except Exception:
            tasks.send(traceback.format_exc())
        else:
            tasks.send(None)


def forked(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A process that runs `function(*args)`."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def die_at(count: int) -> None:
    """Kills this process before its `count`-th change of a run folder, from now on."""
    seen = 0

    def hook(event: str, args: Any) -> None:
        nonlocal seen
        if event in CHANGES or (event == "open" and _is_written(*args[:2])):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _is_written(path: Any, mode: str | None) -> bool:
    return "global_step" in str(path) and mode is not None and "w" in mode


def tiny_save(out: Path, start: int, step: int, die: int) -> None:
    """A tiny run goes on from a checkpoint, 0 for none, and saves; see `die_at`."""
    tiny = TinyRun()
    if start:
        tiny.restore(out / f"global_step_{start}")
    tiny.train(step - start)
    die_at(die)
    tiny.save(out, step, keep=1, best_of="val/accuracy")


def run(
    out: Path,
    told: Connection,
    options: tuple[str, ...],
    die: int = 0,
    group: tuple[int, int, Path] | None = None,
) -> None:
    """A run on the small model, which tells from which step it goes on, and each that is done.

    Args:
        out: the run folder; what the run says on stderr is appended to `out.stderr`.
        told: takes the numbers.
        options: overrides of the configuration.
        die: of the first checkpoint, the change at which it kills itself; 0: none.
        group: the number of this process, how many there are, and a file by which they meet.
    """
    with out.with_suffix(".stderr").open("a") as errors:
        os.dup2(errors.fileno(), 2)
    if group:
        rank, world, store = group
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        limit = timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
        )
    trainer = Trainer(config(out, *options))
    save = trainer.save

    def deadly(*args: Any) -> Any:
        if die:
            die_at(die)
        return save(*args)

    trainer.save = deadly  # type: ignore[method-assign]
    told.send(trainer.step)
    trainer.fit(lambda step, _: told.send(step))
    if group:
        dist.barrier()
        dist.destroy_process_group()
