"""Operators that are differentiable once: what refuses the second derivative."""

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse(op: str) -> NoReturn:
    """What the backward of a backward does."""
    raise RuntimeError(
        f"{op}: expected one backward, got a second derivative; it has none, compute it with "
        "backend='reference'"
    )


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(op: str, upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
        return (upstream * gradient).to(gradient.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse(ctx.op)


def scaled(op: str, upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    """A gradient by `of` that the forward has finished, times the loss's own."""
    # Without `of` the result would count as constant, and a second derivative as zero.
    scaled: Tensor = _Scaled.apply(op, upstream, gradient, of)
    return scaled
