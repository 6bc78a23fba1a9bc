"""Killed at any moment, a run goes on, and ends as the run that was not killed: bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from support import killed
from support.killed import Clean
from support.small_run import config
from support.tiny_run import TinyRun, names

from roma.train.checkpoint import starting_point
from roma.train.saved.manifest import files_of

KILLED = -signal.SIGKILL
LIMIT = 120.0  # seconds that a rank may go on alone; gloo says at once that the other is gone
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: make test-deepspeed",
)
STEPS, KILLS = 30, 20
OPTIONS = ("trainer.save_freq=2",)


@pytest.fixture(scope="module")
def clean() -> Iterator[Clean]:
    """One for all tests: it imports for seconds."""
    running = Clean(600.0)
    yield running
    running.stop()


@pytest.mark.slow
def test_killed_at_every_change_of_a_save(clean: Clean, tmp_path: Path) -> None:
    """A file opened to be written, a folder made, a rename, a deletion: before each of a save."""
    clean.run(_kill_at_every_change, tmp_path)


def _kill_at_every_change(folder: Path) -> None:
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
    assert moment > 10  # seven files, a folder below, two renames
    before = f"global_step_{there[-1]}" if there else None
    assert found == {before, f"global_step_{step}"}


class Life:
    """The processes of a run, up to its end or their being killed."""

    def __init__(
        self, out: Path, *options: str, die: int = 0, world: int = 1, dies: int = 0
    ) -> None:
        self.told, self.processes = [], []
        out.parent.mkdir(exist_ok=True)
        store = out.with_suffix(".store")
        store.unlink(missing_ok=True)
        for rank in range(world):
            told, theirs = Pipe(duplex=False)
            group = (rank, world, store) if world > 1 else None
            own = die if rank == dies else 0
            process = killed.forked(killed.run, out, theirs, (*OPTIONS, *options), own, group)
            theirs.close()
            self.told.append(told)
            self.processes.append(process)

    def steps(self) -> Iterator[int]:
        """The step from which it goes on, and each that is done, until it is dead."""
        try:
            while True:
                yield self.told[0].recv()
        except EOFError:
            self.end()

    def kill_after(self, steps: int, seconds: float, rank: int = 0) -> None:
        """Waits for steps and some time, kills one if it still runs, and until all are dead."""
        told = self.steps()
        for _ in range(1 + steps):  # from the word that it begins
            next(told, None)
        self.processes[rank].join(seconds)
        self.processes[rank].kill()
        self.end()

    def end(self) -> None:
        """Until all are dead; the others of a killed one hear that it is gone."""
        for process in self.processes:
            process.join(LIMIT)
            assert process.exitcode is not None, "a rank waits for one that is dead"

    @property
    def codes(self) -> list[int | None]:
        """How they ended."""
        return [process.exitcode for process in self.processes]


def same(out: Path, whole: Path, last: int = STEPS) -> None:
    """Weights and optimizer, and each step logged once."""
    own = out / f"global_step_{last}"
    files = [name for name in files_of(own) if name.endswith("safetensors")]
    assert any(name.startswith("actor/") for name in files)
    assert any(name.startswith("optimizer") for name in files)
    for name in files:
        assert (own / name).read_bytes() == (whole / name).read_bytes(), name
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, last + 1))
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_killed_twenty_times(clean: Clean, tmp_path: Path) -> None:
    """At random moments, every other one within a checkpoint; a run that is done is followed."""
    clean.run(_kill_often, tmp_path, KILLS, 1, f"trainer.total_steps={STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero2", marks=NO_DEEPSPEED)])
def test_one_of_two_ranks_is_killed(clean: Clean, tmp_path: Path, engine: str) -> None:
    """Now the one, now the other; the one that is left ends with an error."""
    few = ("trainer.total_steps=6", f"trainer.engine={engine}", "algorithm.view_mode=none")
    clean.run(_kill_often, tmp_path, 4, 2, *few)


def _kill_often(folder: Path, kills: int, world: int, *options: str) -> None:
    last = config(folder, *options).trainer.total_steps
    whole, took = folder / "whole", [time.monotonic()]
    for step in Life(whole, *options, world=world).steps():
        assert step == len(took) - 1
        took.append(time.monotonic())
    assert len(took) == last + 2
    a_step = (took[-1] - took[1]) / last
    drawn, killed_so_far, runs, in_save = random.Random(0), 0, 0, 0
    while True:
        out, victim = folder / str(runs), drawn.randrange(world)
        if killed_so_far == kills:
            life = Life(out, *options, world=world)
            list(life.steps())
        elif killed_so_far % 2:
            moment, victim = drawn.randrange(1, 12), 0  # of another rank Python sees no change
            life = Life(out, *options, die=moment, world=world, dies=victim)
            list(life.steps())
        else:
            life = Life(out, *options, world=world)
            # After a checkpoint, at any moment of a step; a time alone would fall before the first
            # one or after the run.
            life.kill_after(drawn.randrange(2, 4), drawn.uniform(0, a_step), victim)
        if not any(life.codes):
            same(out, whole / f"global_step_{last}", last)
            if killed_so_far == kills:
                break
            runs += 1
            continue
        assert life.codes[victim] == KILLED and all(life.codes)
        in_save += any(out.glob(".global_step_*"))
        killed_so_far += 1
    assert in_save >= kills // 4


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_asked_to_stop(clean: Clean, tmp_path: Path, world: int) -> None:
    clean.run(_stop, tmp_path, world)


def _stop(folder: Path, world: int) -> None:
    """Two ranks save at the same step, although one alone has got the signal."""
    few = ("trainer.total_steps=12", "trainer.save_freq=0", "algorithm.view_mode=none")
    whole = folder / "whole"
    assert list(Life(whole, *few, world=world).steps())[-1] == 12
    out = folder / "stopped"
    for name, taken in (("SIGTERM", signal.SIGTERM), ("SIGUSR1", signal.SIGUSR1)):
        life = Life(out, *few, world=world)
        steps = life.steps()
        next(steps), next(steps)  # it is among its steps
        os.kill(life.processes[-1].pid, taken)
        step = list(steps)[-1]
        assert life.codes == [0] * world
        assert 0 < step < 12 and (out / f"global_step_{step}").is_dir()
        line = f"stopped by {name}: step {step} is saved, the same command goes on\n"
        assert out.with_suffix(".stderr").read_text().count(line) == 1
    assert list(Life(out, *few, world=world).steps())[-1] == 12
    same(out, whole / "global_step_12", 12)
