"""A count of the matrix products that an op really did, so that skipped rows can be proved.

The launchers report here; `roma.testing.count_products` listens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Products(NamedTuple):
    """So many products [rows, D] × [D, columns] (or one of its two transposes) in one launch."""

    purpose: str
    """ "forward", "recompute", "dhidden" or "dweight"."""
    rows: int
    """Rows computed, those that only fill a block included."""
    columns: int
    depth: int

    @property
    def flop(self) -> int:
        """Floating-point operations, two per multiply-add."""
        return 2 * self.rows * self.columns * self.depth


_LISTENER: ContextVar[list[Products] | None] = ContextVar("_LISTENER", default=None)


@contextmanager
def listen() -> Iterator[list[Products]]:
    """Collects what is reported inside the block, in this thread and context."""
    reports: list[Products] = []
    token = _LISTENER.set(reports)
    try:
        yield reports
    finally:
        _LISTENER.reset(token)


def listening() -> bool:
    """Whether anyone counts: only then may a launcher wait for the device to learn a number."""
    return _LISTENER.get() is not None


def report(purpose: str, rows: int, columns: int, depth: int) -> None:
    """Reports one launch."""
    reports = _LISTENER.get()
    if reports is not None:
        reports.append(Products(purpose, rows, columns, depth))
