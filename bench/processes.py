"""Processes with a time limit, killed whole, their output heard line by line."""

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LONGEST = 2**16  # bytes of one line; a longer one is heard in pieces


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int | None
    """Its exit code, negative for a signal; None: it was killed by us."""
    why: str
    """Why it was killed: "timeout", "silence"; "" otherwise."""
    seconds: float
    last: str
    """The last line that it said."""

    @property
    def reason(self) -> str:
        """Why it did not end well, in words; "" if it did."""
        if self.code == 0:
            return ""
        if self.code is None:
            what = {"timeout": "killed after", "silence": "said nothing, killed after"}[self.why]
            return f"{what} {self.seconds:.0f} s" + (f"; last: {self.last}" if self.last else "")
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"died of {name}" + (f"; last: {self.last}" if self.last else "")
        return self.last or f"exit code {self.code}"


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that imports from the bare checkout."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(dict.fromkeys(p for p in paths if p))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(more or {})}


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, "-m", name, *arguments]


def watch(
    command: Sequence[str],
    hear: Callable[[str], None],
    *,
    seconds: float,
    silence: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs a command in the checkout's root, at most `seconds`, at most `silence` without a word.

    Whatever it started ends with it. Output that is no UTF-8 is heard with marks in its place.

    Raises:
        KeyboardInterrupt: this program was told to stop (`stop_on`).
    """
    begin = spoke = time.monotonic()
    last, kept = "", b""
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(env),
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    why, open_ = "", True
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while open_ or process.poll() is None:
                if _stopped.is_set():
                    raise KeyboardInterrupt
                now = time.monotonic()
                if now - begin > seconds:
                    why = "timeout"
                    break
                if silence is not None and now - spoke > silence:
                    why = "silence"
                    break
                if open_ and selector.select(timeout=0.1):
                    chunk = os.read(process.stdout.fileno(), _LONGEST)
                    open_, spoke = bool(chunk), time.monotonic()
                    *lines, kept = (kept + chunk).split(b"\n")
                    if len(kept) >= _LONGEST or not chunk:
                        lines, kept = [*lines, kept], b""
                    for line in lines:
                        text = line.decode(errors="replace").rstrip("\r")
                        if not text.startswith("@"):  # for the journal, not for a reader
                            last = text.strip()[:300] or last
                        hear(text)
                elif process.poll() is not None:
                    break  # what it left behind may hold the pipe open for ever
                elif not open_:
                    time.sleep(0.05)
    finally:
        kill(process)
        process.stdout.close()
    return Outcome(None if why else process.returncode, why, time.monotonic() - begin, last)


_stopped = threading.Event()


def stop_on(*signals: int) -> None:
    """Makes signals end `watch`, at a place where nothing swallows them, as fork's hooks do."""
    for number in signals:
        signal.signal(number, lambda *_: _stopped.set())


_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """In a child: the kernel ends it when its parent does, so that nothing stays on the GPU.

    One call of a function that was loaded before, and no lock is taken: safe between fork and exec,
    beside other threads. Only Linux can.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process, its group, and everything that it started, whatever group that is in."""
    for pid in descendants(process.pid):
        _signal(os.kill, pid)
    _signal(os.killpg, process.pid)
    process.wait()


def _signal(send: Callable[[int, int], None], pid: int) -> None:
    try:
        send(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended already


def descendants(pid: int) -> list[int]:
    """The children of a process, theirs, and so on; from /proc, so on Linux only."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
        parents.setdefault(parent, []).append(int(folder.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def pool(
    commands: Mapping[str, Sequence[str]],
    *,
    slots: int,
    seconds: float,
    begin: Callable[[str], None] = lambda name: None,
    env: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Outcome, list[str]]]:
    """Runs commands side by side, in order, `slots` at a time; gives each as it ends.

    Yields:
        The command's name, how it ended, and the lines that it said.
    """

    def one(name: str) -> tuple[str, Outcome, list[str]]:
        begin(name)
        lines: list[str] = []
        return name, watch(commands[name], lines.append, seconds=seconds, env=env), lines

    with ThreadPoolExecutor(slots) as threads:
        for future in as_completed([threads.submit(one, name) for name in commands]):
            yield future.result()


def output(*command: str) -> str:
    """What a short command prints; "" if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """ROMA_COMMIT, or git's, marked + if files were changed."""
    told = os.environ.get("ROMA_COMMIT")
    if told:
        return told
    head = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return head + ("+" if changed else "") or "-"
