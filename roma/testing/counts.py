"""`count_products`: how many rows a call multiplied by the head, and in how many products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from roma_kernels.products import Products, listen


class ProductCount:
    """Matrix products with the head that were done so far, rows that only fill a block included."""

    def __init__(self, reports: list[Products]) -> None:
        """Counts what is in `reports`, and what is still to come."""
        self._reports = reports

    @property
    def flop(self) -> int:
        """Floating-point operations of all products, two per multiply-add."""
        return sum(report.flop for report in self._reports)

    def rows(self, purpose: str, vocabulary: int) -> float:
        """Rows that were multiplied by the whole head [V, D] for one purpose.

        Args:
            purpose: "forward", "recompute" (of logits, in the backward), "dhidden" or "dweight".
            vocabulary: V; a row multiplied by half of the head counts one half.
        """
        mine = [r for r in self._reports if r.purpose == purpose]
        return sum(r.rows * r.columns for r in mine) / vocabulary


@contextmanager
def count_products() -> Iterator[ProductCount]:
    """Counts the matrix products of every call inside the block, on this thread.

    While it counts, a launcher waits for the device to learn how many rows a call had.

    Example:
        >>> import roma, torch
        >>> h, W = torch.randn(8, 4, requires_grad=True), torch.randn(50, 4)
        >>> with count_products() as count:
        ...     out = roma.linear_logprob(h, W, torch.arange(8), backend="torch")
        ...     out.logp[:2].sum().backward()
        >>> count.rows("forward", 50), count.rows("dhidden", 50)
        (8.0, 2.0)
    """
    with listen() as reports:
        yield ProductCount(reports)
