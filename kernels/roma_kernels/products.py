"""Matrix products with fp32 sums, and a count of all that an op really multiplied.

The launchers report here, so that skipped rows can be proved: `roma.testing.count_products`
listens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """One launch of [rows, D] × [D, columns], or of one of the two transposes."""

    purpose: str
    """ "forward", "recompute", "dhidden" or "dweight"."""
    rows: int
    """Rows computed, padding of the last block included."""
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


def mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right, summed and returned in `dtype`."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))  # only GPU libraries have a widening product


def mm_out(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes left·right to `out`; summed in fp32 (or float64), rounded once."""
    out.copy_(mm(left, right, torch.promote_types(out.dtype, torch.float32)))


def addmm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left·right to an fp32 (or float64) total, in whose precision the sum is kept."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
