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
import sys, threading, time
sys.modules["torch"] = sys.modules["torch.distributed"] = sys.modules["roma.train.ranks"] = \\
    type(sys)("ranks")
sys.modules["roma.train.ranks"].told = lambda value: [value]
from importlib import util
spec = util.spec_from_file_location("signals", sys.argv[1])
signals = util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.Preemption(float(sys.argv[2])) as preemption:
    print("ready", flush=True)
    while not preemption.requested():
        time.sleep(0.001)
    print(preemption.name, flush=True)
    {work}
"""
HANGS = "lock = threading.Lock(); lock.acquire(); lock.acquire()"  # in C; no handler can run
BUSY = "time.sleep(60)"


@pytest.mark.parametrize("work", [HANGS, BUSY])
def test_a_second_sigterm_ends_the_process(work: str) -> None:
    import roma.train.signals as module

    arguments = [sys.executable, "-c", PROGRAM.replace("{work}", work)]
    process = subprocess.Popen(
        [*arguments, str(Path(str(module.__file__))), "0.05"], stdout=subprocess.PIPE, text=True
    )
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
