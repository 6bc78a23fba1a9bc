"""A reward function in a process of its own, which is killed when it hangs and started anew."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from roma.rewards.boxed import RewardInput
from roma.rewards.marked import Failed, Score
from roma_kernels.errors import fail

_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
_RUN = "from roma.rewards.worker import serve; a = sys.argv; serve(int(a[1]), a[2], int(a[3]))"


class ProcessReward:
    """Scores responses with a function of EasyR1's signature, within a time limit.

    The function is called on a whole batch first, as EasyR1 does. If that raises, hangs or returns
    something else than one dict per response, it is called row by row, and the rows that fail again
    are marked. A batch may take ten times `timeout_s`, or `timeout_s` a row if that is less; after
    rows that took longer one by one, twice what they took. So a rollout that hangs costs a batch
    11 times `timeout_s`, a further one `timeout_s`. After `most_cuts` of them in a batch its other
    rows are marked without a try.

    Args:
        spec: "file.py:function" or "package.module:function".
        timeout_s: what the function may take for one response, seconds.
        rowwise: call it row by row from the start, for a function whose calls are independent.
        most_cuts: of a batch.
        start_s: what loading the function may take, seconds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not load, in time; the message says what is wrong.
    """

    def __init__(
        self,
        spec: str,
        *,
        timeout_s: float = 10.0,
        rowwise: bool = False,
        most_cuts: int = 32,
        start_s: float = 300.0,
    ) -> None:
        """Starts the process, so that a mistake in a file shows before the first step."""
        self.spec, self.timeout_s, self.rowwise = spec, timeout_s, rowwise
        self.most_cuts, self.start_s = most_cuts, start_s
        self._together_s = 10 * timeout_s
        self._worker: _Worker | None = _Worker(spec, start_s)

    def __call__(self, reward_inputs: Sequence[RewardInput]) -> list[Score | Failed]:
        """The scores; of a row that failed, why."""
        rows = [dict(item) for item in reward_inputs]
        if len(rows) > 1 and not self.rowwise:
            worker = self._ready()
            worker.send(rows, together=True)
            reply = worker.reply(min(self._together_s, self.timeout_s * len(rows)))
            if reply is None:
                self.close()
            elif "scores" in reply:
                return [_read(score) for score in reply["scores"]]
        return self._one_by_one(rows)

    def close(self) -> None:
        """Ends the process; a later call starts one anew."""
        if self._worker:
            self._worker.end()
            self._worker = None

    def _ready(self) -> "_Worker":
        if self._worker is None:
            self._worker = _Worker(self.spec, self.start_s)
        return self._worker

    def _one_by_one(self, rows: list[dict[str, Any]]) -> list[Score | Failed]:
        scores: list[Score | Failed] = []
        cuts, taken, sent = 0, 0.0, False
        while len(scores) < len(rows):
            if cuts >= self.most_cuts:
                reason = f"not tried: the reward was cut {cuts} times in this batch"
                scores += [Failed(reason)] * (len(rows) - len(scores))
                break
            worker = self._ready()
            if not sent:
                worker.send(rows[len(scores) :], together=False)
                sent = True
            begin = time.monotonic()
            reply = worker.reply(self.timeout_s)
            if reply is not None:
                taken += time.monotonic() - begin
                scores.append(_read(reply["scores"][0]))
                continue
            died = worker.died()
            took = f"took longer than {self.timeout_s:g} s"
            scores.append(Failed(f"its process ended ({died})" if died else took))
            self.close()
            cuts, sent = cuts + 1, False
        self._together_s = max(self._together_s, 2 * taken)
        return scores


class _Worker:
    """The process, and the socket to it."""

    def __init__(self, spec: str, start_s: float) -> None:
        self._socket, theirs = Pipe()
        code, path = _START + _RUN, json.dumps(sys.path)
        descriptor = theirs.fileno()
        # Not multiprocessing's spawn, which would import a user's script again. What the function
        # prints goes to stderr: stdout is the trainer's.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, path, str(descriptor), spec, str(os.getpid())],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()
        # Also at the end of the interpreter: a hanging function does not outlive the run.
        self.end = weakref.finalize(self, _end, self._process, self._socket)
        ready = self.reply(start_s)
        if ready is None:
            died = self.died()
            got = f"that its process ended ({died})" if died else "nothing"
            self.end()
            fail(spec, f"that it loads within {start_s:g} s", got, "correct it")
        if "error" in ready:
            self.end()
            missing = ready["kind"] == "FileNotFoundError"
            raise (FileNotFoundError if missing else ValueError)(ready["error"])

    def send(self, rows: Sequence[dict[str, Any]], *, together: bool) -> None:
        with suppress(OSError):  # it has died: the reply says so
            self._socket.send_bytes(json.dumps({"rows": rows, "together": together}).encode())

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """The next reply; None if there is none in time, or the process has ended."""
        try:
            if self._socket.poll(seconds):
                found: dict[str, Any] = json.loads(self._socket.recv_bytes())
                return found
        except (EOFError, OSError):  # it has ended, or is about to
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        return None

    def died(self) -> str | None:
        """How the process ended; None: it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: "subprocess.Popen[bytes]", socket: Connection) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
    process.wait()
    socket.close()


def _read(score: dict[str, float] | str) -> Score | Failed:
    return Failed(score) if isinstance(score, str) else score
