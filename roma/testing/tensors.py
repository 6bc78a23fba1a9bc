"""The tensors behind a drawn input: heads of a named difficulty, streams, strides."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A stream of its own for one drawn value."""
    return torch.Generator().manual_seed(seed)


def head_tensors(
    rows: int, d: int, v: int, difficulty: str, g: torch.Generator, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden [rows, d], weight [v, d], bias [v] or None, tokens [rows], of the named difficulty."""
    hidden = torch.randn(rows, d, generator=g, dtype=torch.float64)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) * (2 / math.sqrt(d))
    offset = torch.randn(v, generator=g, dtype=torch.float64) if bias else None
    tokens = torch.randint(v, (rows,), generator=g)
    if difficulty == "huge_logits":
        weight = weight * 100
    elif difficulty == "below_zero":
        hidden[:, 0] = 10.0
        weight[:, 0] = -10.0
    elif difficulty in ("peaked_tail", "peaked_elsewhere"):
        hidden[:, 0] = 4.0
        weight[v - 1, 0] = 8.0
        tokens.fill_(v - 1 if difficulty == "peaked_tail" else 0)
    elif difficulty == "uniform_weights":
        weight.fill_(1.0)
    elif difficulty == "zero_rows":
        hidden.zero_()
    elif difficulty == "equal_rows":
        hidden[:] = hidden[:1]
    return hidden, weight, offset, tokens


def strided(x: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension, other values between them."""
    other = torch.full_like(x, float("nan")) if x.is_floating_point() else 1 - x.long()
    return torch.stack([x, other.to(x.dtype)], dim=-1)[..., 0]
