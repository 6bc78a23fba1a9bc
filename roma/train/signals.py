"""A request to stop: SIGTERM, or the SIGUSR1 that Slurm sends; the run saves and ends.

    Kubernetes, kill    SIGTERM
    torchrun            hands SIGTERM on, kills after --shutdown-timeout (30 s), ends with 1
    Slurm               --signal=USR1@300 tells the processes of srun five minutes before the end;
                        torchrun would die of it: trap '' USR1 in the shell that starts it

A process may get one request twice, from a scheduler that tells every process and from torchrun. So
a second SIGTERM within `APART` is the same one. A later one ends the process at once, with 143.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from roma.train.ranks import told

APART = 2.0
"""Seconds; an earlier SIGTERM after the first is the same request."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT = 128 + signal.SIGTERM


class Preemption:
    """A context manager in which a signal is a request, to be asked for with `requested`.

    Outside of the main thread, where Python takes no signals, it changes nothing.

    Example:
        >>> with Preemption() as preemption:
        ...     signal.raise_signal(signal.SIGUSR1)
        ...     while not preemption.requested():
        ...         pass
        >>> preemption.name
        'SIGUSR1'
    """

    def __init__(self, apart: float = APART) -> None:
        """Takes no signal yet.

        Args:
            apart: seconds between two SIGTERMs that are two.
        """
        self.name: str | None = None
        """Of the signal that came first, on the first rank that got one; None: none yet."""
        self._apart = apart
        self._own: str | None = None
        self._first_term: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Whether any rank has got a signal; every rank calls, and all hear the same."""
        self.name = next((name for name in told(self._own) if name), None)
        return self.name is not None

    def __enter__(self) -> "Preemption":
        """Takes the signals.

        Python's own handlers wait until the main thread is back from C, which it never is from a
        collective that hangs. The wake-up pipe is written at once, and a thread of ours reads it.
        """
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="preemption")
        self._thread.start()
        self._handlers = {taken: signal.signal(taken, _pass) for taken in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _entered.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the signals back."""
        if not self._handlers:
            return
        self._give_back()
        _entered.remove(self)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def _give_back(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for taken, handler in self._handlers.items():
            signal.signal(taken, handler)
        self._handlers = {}

    def _listen(self) -> None:
        while numbers := os.read(self._read, 64):
            for number in numbers:  # of all signals that Python handles
                if number in SIGNALS:
                    self._note(signal.Signals(number))

    def _note(self, taken: signal.Signals) -> None:
        self._own = self._own or taken.name
        if taken != signal.SIGTERM:
            return
        now = time.monotonic()
        if self._first_term is None:
            self._first_term = now
        elif now - self._first_term >= self._apart:
            os._exit(EXIT)


_entered: list[Preemption] = []


def _give_back_in_child() -> None:
    """A fork shares the pipe: what ends a worker would ask its parent to stop."""
    while _entered:
        own = _entered.pop()
        own._give_back()
        os.close(own._read)
        os.close(own._write)


os.register_at_fork(after_in_child=_give_back_in_child)


def _pass(_: int, __: FrameType | None) -> None:
    """The thread has read it."""
