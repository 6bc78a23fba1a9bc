"""A worker seen from outside: started, heard line by line, killed if it falls silent.

A worker is a process group of its own. It says what it starts before it starts it, so that whatever
ends it has a culprit, and the rest of the run goes on in a new worker.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from bench.job import Job
from bench.processes import environment

Event = dict[str, Any]
START = 120.0  # seconds until the first word: torch and its libraries are imported
_GRACE = 5.0  # seconds for a process to end after it closed its output
_PATIENCE = 60.0  # seconds for the system to take back what a killed one had


class Fault(Exception):
    """Why a worker ended early, in words that follow a candidate's name."""


class Cut(Exception):
    """The run's time is over."""


class Worker:
    """A process that does a job; as a context it is gone at the end, whatever happens."""

    def __init__(self, job: Job) -> None:
        """Starts it."""
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            # Its own session: Ctrl-C reaches the parent alone, which then ends the whole group.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.write(job.to_json().encode())
        except BrokenPipeError:
            pass  # it is dead already, and `events` says so

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def __enter__(self) -> "Worker":
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kills the group."""
        self._end()

    def events(self, until: float = float("inf")) -> Iterator[Event]:
        """What it says, until it says that all is done.

        Args:
            until: the moment, by time.monotonic(), at which the run's time is over.

        Raises:
            Fault: it died, or fell silent for longer than it said that it would.
            Cut: the run's time is over.
        """
        seconds, what = START, "start"
        while True:
            line = self._line(seconds, what, until)
            event: Event = json.loads(line)
            yield event
            if event["event"] == "end":
                return
            if event["event"] == "start":
                seconds, what = event["limit"], event["what"]

    def _line(self, seconds: float, what: str, until: float) -> bytes:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            now = time.monotonic()
            if now > until:
                raise Cut
            if now > deadline:
                raise Fault(f"hangs: nothing after {seconds:g} s in its {what}")
            # What it left behind may hold the pipe open, so its own end counts too; it is asked
            # for before the pipe is read, so that its last words are heard.
            ended = self._ended()
            ready = select.select([pipe], [], [], min(deadline - now, until - now, 0.2))[0]
            chunk = os.read(pipe, 2**16) if ready else b""
            self._buffer += chunk
            if not chunk and (ready or ended):
                raise Fault(f"{self._farewell()} in its {what}")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _ended(self) -> bool:
        """Whether it has ended; leaves it to be waited for, so that its number stays its own."""
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, how) is not None

    def _farewell(self) -> str:
        deadline = time.monotonic() + _GRACE
        while not self._ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._end()
        if code < 0:
            names = {known.value: known.name for known in signal.Signals}
            return f"killed its process: {names.get(-code, f'signal {-code}')}"
        return f"ended its process: code {code}"

    def _end(self) -> int:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # all of it has ended
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL  # a driver holds it; the run goes on beside it
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code
