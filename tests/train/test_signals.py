"""A request to stop is heard by all, once; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.small_run import config

from roma.train.checkpoint import starting_point, step_of
from roma.train.config import dump
from roma.train.signals import SIGNALS, Preemption


def until(preemption: Preemption, seconds: float = 10.0) -> bool:
    """Asks for some time: a thread of the process hears of a signal."""
    end = time.monotonic() + seconds
    while not preemption.requested() and time.monotonic() < end:
        time.sleep(0.001)
    return preemption.requested()


@pytest.mark.parametrize("taken", SIGNALS)
def test_a_signal_is_a_request(taken: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    threads = threading.active_count()
    with Preemption() as preemption:
        assert not preemption.requested() and preemption.name is None
        os.kill(os.getpid(), taken)
        os.kill(os.getpid(), taken)  # at once: of torchrun, and of who told every process
        assert until(preemption) and preemption.name == taken.name
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads
    with Preemption() as other:
        assert not other.requested()


def test_other_signals_are_none() -> None:
    with Preemption() as preemption:
        before = signal.signal(signal.SIGUSR2, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not until(preemption, 0.05)
        signal.signal(signal.SIGUSR2, before)


def test_a_worker_that_is_ended_asks_for_nothing() -> None:
    with Preemption() as preemption:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.write(write, b"ready")
            time.sleep(60)
            os._exit(0)
        os.read(read, 5)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert not until(preemption, 0.05)
        os.kill(os.getpid(), signal.SIGTERM)  # and it still hears
        assert until(preemption)


def test_another_thread_takes_none() -> None:
    def enter() -> None:
        with Preemption() as preemption:
            found.append((signal.getsignal(signal.SIGTERM), preemption.requested()))

    found: list[tuple[object, bool]] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]


PROGRAM = """
import ctypes, sys, time
from roma.train.signals import Preemption
with Preemption(0.05) as preemption:
    print("ready", flush=True)
    while not preemption.requested():
        time.sleep(0.001)
    print(preemption.name, flush=True)
    {work}
"""
# In C, and no handler of Python's runs; as in a collective for which the other ranks do not come.
HANGS = "lock = ctypes.create_string_buffer(64); take = ctypes.CDLL(None).pthread_mutex_lock"
HANGS += "; take(lock); take(lock)"
BUSY = "time.sleep(60)"


@pytest.mark.parametrize("work", [HANGS, BUSY])
def test_a_second_sigterm_ends_the_process(work: str) -> None:
    program = PROGRAM.replace("{work}", work)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGUSR1)  # which never ends it
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("taken", SIGNALS)
def test_under_torchrun(tmp_path: Path, taken: signal.Signals) -> None:
    """As Slurm does: every process gets the signal, and torchrun hands SIGTERM on or ignores."""
    given = config(tmp_path, "trainer.total_steps=100000", "algorithm.view_mode=none")
    (tmp_path / "run.yaml").write_text(dump(given))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ignoring = ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash"]
    run = subprocess.Popen(
        [*ignoring, *launcher, "-m", "roma", "train", str(tmp_path / "run.yaml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks: list[str] = []
    try:
        lines = tmp_path / "metrics.jsonl"
        while not (lines.exists() and lines.stat().st_size) and run.poll() is None:
            time.sleep(0.05)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        for process in (run.pid, *map(int, ranks)):
            os.kill(process, taken)
        _, said = run.communicate(timeout=60)
    finally:
        for process in (run.pid, *map(int, ranks)) if run.poll() is None else ():
            os.kill(process, signal.SIGKILL)
    assert said.count(f"stopped by {taken.name}: step ") == 1, said
    assert run.returncode == 0 or taken == signal.SIGTERM  # which torchrun calls an error
    saved = starting_point(tmp_path, "auto")
    assert saved is not None and step_of(saved) == len(lines.read_text().splitlines())
