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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from support.small_run import config
from support.tiny_run import TinyRun

from roma.train.trainer import Trainer

# Of Python's audit events those of a save: a file is opened, made, renamed, removed.
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync")


def in_clean_process(function: Callable[..., None], *args: Any) -> None:
    """`function(*args)` in a new process without threads, which may call `forked`.

    Raises:
        AssertionError: with what the function raised.
    """
    context = multiprocessing.get_context("spawn")
    said, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        failed = said.recv()
    except EOFError:
        failed = "it ended without a word"
    process.join()
    if failed is not None:
        raise AssertionError(failed)


def _alone(said: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:
        said.send(traceback.format_exc())
        raise
    said.send(None)


def forked(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A process that runs `function(*args)`."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, daemon=True)
    process.start()
    return process


def die_at(count: int) -> None:
    """Kills this process before its `count`-th step of writing, from now on."""
    seen, sync = 0, os.fsync

    def hook(event: str, args: Any) -> None:
        nonlocal seen
        if event not in WRITES or (event == "open" and not _below(args[0])):
            return
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        hook("os.fsync", ())  # Python has no event for it
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def _below(path: Any) -> bool:
    """Whether a file is of a checkpoint or the tracker; Python opens modules, too."""
    return isinstance(path, str | os.PathLike) and (
        "global_step" in str(path) or "tracker" in str(path)
    )


def tiny_save(out: Path, start: int, step: int, die: int) -> None:
    """A tiny run goes on from a checkpoint, 0 for none, and saves; see `die_at`."""
    tiny = TinyRun()
    if start:
        tiny.restore(out / f"global_step_{start}")
    tiny.train(step - start)
    die_at(die)
    tiny.save(out, step, keep=1, best_of="val/accuracy")


def run(out: Path, told: Connection, options: tuple[str, ...], die: int = 0) -> None:
    """A run on the small model, which tells from which step it goes on, and each that is done.

    Args:
        out: the run folder.
        told: takes the numbers.
        options: overrides of the configuration.
        die: of the first checkpoint, the step of writing at which it kills itself; 0: none.
    """
    trainer = Trainer(config(out, *options))
    save = trainer.save

    def deadly(*args: Any) -> Any:
        if die:
            die_at(die)
        return save(*args)

    trainer.save = deadly  # type: ignore[method-assign]
    told.send(trainer.step)
    trainer.fit(lambda step, _: told.send(step))
