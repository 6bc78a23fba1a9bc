"""What a head is asked: the rows, their tokens, the weights; and what every back end provides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes. At V = 152k, D = 4096 and 8192 active rows: vocabulary tiles of 16k entries, ten of them.
TRITON_WORKSPACE = 512 * 2**20


@dataclass(frozen=True)
class Rows:
    """The R = n·(K+1) rows of n tokens; the K+1 views of a token stand side by side.

    Row r belongs to token r // (K+1); its view is r % (K+1), of which 0 is the clean one.
    """

    hidden: Tensor  # [M, D]
    view_hidden: Tensor | None  # [K, M, D]; None: K = 0
    tokens: Tensor  # [n] int64
    row_scale: Tensor | None  # [n], 1/τ of each token; None: Head.scale for all
    index: Tensor | None  # [n] int64, places of the tokens among the M; None: n = M, in order
    counted: Tensor | None  # 0-dim int64: only the first so many tokens are wanted; None: all

    @property
    def views(self) -> int:
        """K+1."""
        return 1 if self.view_hidden is None else 1 + len(self.view_hidden)

    @property
    def count(self) -> int:
        """R."""
        return len(self.tokens) * self.views


@dataclass(frozen=True)
class Head:
    """A head, or this rank's slice of its vocabulary."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float  # 1/τ
    softcap: float | None
    start: int  # token of the first weight row


@dataclass(frozen=True)
class Active:
    """The A rows that have an upstream gradient, and all that their dlogits depend on."""

    chosen: Tensor  # [A] int64, numbers of rows
    wanted: Tensor | None  # 0-dim int64: only the first so many of them; None: all
    states: Tensor  # [A, D]
    tokens: Tensor  # [A]
    row_scale: Tensor | None  # [A]
    lse: Tensor  # [A]
    entropy: Tensor | None  # [A]
    dlogp: Tensor  # [A]
    dentropy: Tensor | None  # [A]
    boost: Tensor | None  # 0-dim: a power of two on every dlogit, so that fp16 can hold them

    def part(self, rows: slice) -> "Active":
        """Some of the rows."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return Active(
            self.chosen[rows], None, self.states[rows], self.tokens[rows], cut(self.row_scale),
            self.lse[rows], cut(self.entropy), self.dlogp[rows], cut(self.dentropy), self.boost,
        )  # fmt: skip


class Kernels(NamedTuple):
    """What a back end provides."""

    sweep: Callable[[Rows, Head, Tensor], None]
    """Fills sums [3 or 4, R] with peak, total, target and (if four) moment of each wanted row."""
    take: Callable[[Rows, Tensor, Tensor | None], Tensor]
    """Hidden states [A, D] of the chosen rows."""
    give: Callable[[Rows, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
    """Gradients by hidden and view_hidden from those of the chosen rows."""
    dlogits: Callable[[Active, Head], Tensor]
    """dz [A, V] for a head of V entries, in the dtype of the rows' states."""
    multiply: Callable[[Tensor, Tensor, Tensor, bool], None]
    """Writes left·right to the first, or adds it if the last is true; sums in fp32 (or float64)."""
    dtype: Callable[[Tensor, Tensor], torch.dtype]
    """The dtype that states, weights and dlogits are multiplied in, of (hidden, weight)."""
    workspace: int
    """Bytes that a tile of dlogits and of dW may take by default."""
    least_columns: int
    """A tile of dlogits is no narrower, however many rows there are."""


def packed_places(mask: Tensor) -> Tensor:
    """Where `mask` [M] holds, in order and at the front of [M]; zeros behind, as many as it lacks.

    `mask.nonzero()` without its wait for the device: a prefix sum and a scatter.
    """
    size = len(mask)
    numbers = torch.arange(size, device=mask.device)
    slots = torch.where(mask, mask.cumsum(0) - 1, size)
    return numbers.new_zeros(size + 1).scatter_(0, slots, numbers)[:size]
