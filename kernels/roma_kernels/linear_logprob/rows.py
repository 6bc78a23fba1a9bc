"""What kernels work on: rows of hidden states, a head, active rows; what a back end provides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from roma_kernels.products import capturing

# Bytes. At V = 152k, D = 4096 and 8192 active rows: vocabulary tiles of 16k entries, ten of them.
GPU_WORKSPACE = 512 * 2**20


@dataclass(frozen=True)
class Rows:
    """The R = n·(K+1) rows of n tokens; the K+1 rows of a token lie side by side.

    Row r belongs to token r // (K+1); its image is r % (K+1): 0 the clean one, k view k − 1.
    """

    hidden: Tensor  # [M, D]
    view_hidden: Tensor | None  # [K, M, D]; None: K = 0
    tokens: Tensor  # [n] int64
    row_scale: Tensor | None  # [n], 1/τ of each token; None: Head.scale for all
    index: Tensor | None  # [n] int64, position of each token among the M; None: n = M, in order
    num_tokens: Tensor | None  # 0-dim int64: only the first num_tokens are computed; None: all n

    @property
    def per_token(self) -> int:
        """K+1."""
        return 1 if self.view_hidden is None else 1 + len(self.view_hidden)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.tokens) * self.per_token

    def trimmed(self) -> "Rows":
        """The rows that are computed, and no others; reads num_tokens from the device.

        Nothing can be read while a CUDA graph is captured: then all rows.
        """
        if self.num_tokens is None or capturing(self.num_tokens):
            return self
        n, by_token = int(self.num_tokens), ("tokens", "row_scale", "index")
        cut = {name: x[:n] for name in by_token if (x := getattr(self, name)) is not None}
        return replace(self, **cut, num_tokens=None)


@dataclass(frozen=True)
class Head:
    """A head, or a slice of its vocabulary."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float  # 1/τ
    softcap: float | None
    start: int  # token id of the first weight row

    @property
    def has_options(self) -> bool:
        """Whether a logit is more than a product and a scale."""
        return self.bias is not None or self.softcap is not None

    def part(self, vocab: slice, dtype: torch.dtype) -> "Head":
        """A range of the vocabulary, its weights in `dtype`."""
        bias = None if self.bias is None else self.bias[vocab]
        weight, start = self.weight[vocab].to(dtype), self.start + vocab.start
        return replace(self, weight=weight, bias=bias, start=start)


@dataclass(frozen=True)
class Upstream:
    """What the backward gets of each row [R]: results of the forward, and the gradients by them."""

    lse: Tensor
    entropy: Tensor | None  # None together with dentropy
    dlogp: Tensor
    dentropy: Tensor | None


@dataclass(frozen=True)
class Active:
    """The A rows that have an upstream gradient, and all that their dlogits depend on."""

    rows: Tensor  # [A] int64, numbers of rows
    out_of: int  # R, among which they are: launches are sized by it where A must not matter
    num_active: Tensor | None  # 0-dim int64: only the first num_active count; None in a part
    states: Tensor  # [A, D]
    tokens: Tensor  # [A]
    row_scale: Tensor | None  # [A]
    lse: Tensor  # [A]
    entropy: Tensor | None  # [A]
    dlogp: Tensor  # [A]
    dentropy: Tensor | None  # [A]
    loss_scale: Tensor | None  # 0-dim: a power of two on every dlogit, so that fp16 can hold it

    def part(self, block: slice) -> "Active":
        """A range of the rows."""
        by_row = ("rows", "states", "tokens", "row_scale", "lse", "entropy", "dlogp", "dentropy")
        cut = {name: x[block] for name in by_row if (x := getattr(self, name)) is not None}
        return replace(self, **cut, num_active=None)


class Kernels(NamedTuple):
    """What a back end provides."""

    sweep: Callable[[Rows, Head, Tensor], None]
    """Fills sums [3 or 4, R] with peak, total, target and (if four) moment of each row."""
    gather: Callable[[Rows, Tensor, Tensor | None], Tensor]
    """Hidden states [A, D] of rows [A]; zeros from row num_active on."""
    scatter: Callable[[Rows, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
    """Gradients by hidden and view_hidden from those of rows [A], zeros elsewhere."""
    dlogits: Callable[[Active, Head], Tensor]
    """dz [A, V] for a head of V entries, in the dtype of the rows' states."""
    mm_out: Callable[[Tensor, Tensor, Tensor], None]
    """out, left, right: writes left·right to out; sums in fp32 (or float64), rounds once."""
    addmm_: Callable[[Tensor, Tensor, Tensor], None]
    """total, left, right: adds left·right to an fp32 (or float64) total."""
    dtype: Callable[[Tensor, Tensor], torch.dtype]
    """The dtype that states, weights and dlogits are multiplied in, of (hidden, weight)."""
    workspace: int
    """Bytes that a tile of dlogits and of dW may take by default; GPU_WORKSPACE on a GPU."""
    least_columns: int
    """A tile of dlogits is no narrower, however many rows there are."""


def packed_index(mask: Tensor) -> Tensor:
    """Positions where `mask` [M] holds, in order, at the front of [M]; zeros behind.

    `mask.nonzero()` without its wait for the device: a prefix sum and a scatter.
    """
    size = len(mask)
    positions = torch.arange(size, device=mask.device)
    slots = torch.where(mask, mask.cumsum(0) - 1, size)
    return positions.new_zeros(size + 1).scatter_(0, slots, positions)[:size]
