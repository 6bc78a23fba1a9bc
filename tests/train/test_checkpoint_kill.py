"""Killed at any moment, a run goes on, and ends as the run that was not killed: bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from support import killed, small_model
from support.tiny_run import TinyRun, names

from roma.train.checkpoint import starting_point
from roma.train.saved.manifest import files_of

KILLED = -signal.SIGKILL
STEPS, KILLS = 30, 20
OPTIONS = (f"trainer.total_steps={STEPS}", "trainer.save_freq=2")


@pytest.mark.slow
def test_killed_at_every_step_of_writing(tmp_path: Path) -> None:
    """A file opened, a folder made, a rename, a deletion, a sync: before each of a save."""
    killed.in_clean_process(_kill_at_every_step, tmp_path)


def _kill_at_every_step(folder: Path) -> None:
    _check_each(folder / "first", (), 0, 2)
    _check_each(folder / "next", (2,), 2, 4)
    _check_each(folder / "the same step again", (2, 4), 2, 4)


def _check_each(folder: Path, there: tuple[int, ...], start: int, step: int) -> None:
    """Of a run with some checkpoints that goes on from `start` and saves at `step`."""
    whole, base = TinyRun(), folder / "base"
    base.mkdir(parents=True)
    for saved in range(1, 7):
        whole.train(1)
        if saved in there:
            whole.save(base, saved)
    found = set()
    for moment in range(1, 1000):
        out = folder / str(moment)
        shutil.copytree(base, out)
        process = killed.forked(killed.tiny_save, out, start, step, moment)
        process.join()
        point = starting_point(out, "auto")
        found.add(point and point.name)
        resumed, done = TinyRun(seed=0 if point is None else 1), 0
        if point is not None:
            done = resumed.restore(point)["step"]
        resumed.train(6 - done)
        assert torch.equal(resumed.weights(), whole.weights()), moment
        resumed.save(out, 6, keep=1)
        assert names(out) == ["checkpoint_tracker.json", "global_step_6"], moment
        shutil.rmtree(out)
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
    assert moment > 40  # six files, each opened, synced, measured, and what is around them
    before = f"global_step_{there[-1]}" if there else None
    assert found == {before, f"global_step_{step}"}


class Life:
    """One process of a run, up to its end or its being killed."""

    def __init__(self, out: Path, *options: str, die: int = 0) -> None:
        self.told, theirs = Pipe(duplex=False)
        self.process = killed.forked(killed.run, out, theirs, (*OPTIONS, *options), die)
        theirs.close()

    def steps(self) -> Iterator[int]:
        """The step from which it goes on, and each that is done, until it is dead."""
        try:
            while True:
                yield self.told.recv()
        except EOFError:
            self.process.join()

    def kill_after(self, seconds: float) -> None:
        """Waits from its first step on, kills it if it still runs, and until it is dead."""
        next(self.steps(), None)
        self.process.join(seconds)
        self.process.kill()
        self.process.join()


def same(out: Path, uninterrupted: Path) -> None:
    """Weights and optimizer, and each step logged once."""
    own = out / f"global_step_{STEPS}"
    files = [name for name in files_of(own) if name.endswith("safetensors")]
    assert any(name.startswith("actor/") for name in files)
    assert any(name.startswith("optimizer") for name in files)
    for name in files:
        assert (own / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    """At random moments, every other one within a checkpoint; a run that is done is followed."""
    killed.in_clean_process(_kill_often, tmp_path)


def _kill_often(folder: Path) -> None:
    small_model.folder()  # once, for all of them
    assert list(Life(folder / "whole").steps()) == list(range(STEPS + 1))
    whole = folder / "whole" / f"global_step_{STEPS}"
    drawn, kills, runs, in_save = random.Random(0), 0, 0, 0
    while True:
        out = folder / str(runs)
        if kills < KILLS and kills % 2:
            life = Life(out, die=drawn.randrange(1, 80))
            list(life.steps())
        elif kills < KILLS:
            life = Life(out)
            life.kill_after(drawn.uniform(0, 1))
        else:
            life = Life(out)
            list(life.steps())
        if life.process.exitcode == 0:
            same(out, whole)
            if kills == KILLS:
                break
            runs += 1
            continue
        assert life.process.exitcode == KILLED
        in_save += any(out.glob(".global_step_*"))
        kills += 1
    assert in_save >= KILLS // 4
