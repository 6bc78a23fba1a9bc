"""Operators are differentiable once, in reverse mode; everything else is refused here."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from roma_kernels.errors import fail


def refuse_second_derivative(op: str) -> NoReturn:
    """What the backward of a backward does."""
    raise RuntimeError(
        f"{op}: expected one backward, got a second derivative; it has none, compute it with "
        "backend='reference'"
    )


def differentiable_never(operator: Any, op: str) -> None:
    """Registers that an operator, the backward of `op`, has no derivative of its own."""

    def keep_nothing(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        """There will be no backward to keep anything for."""

    def refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
        refuse_second_derivative(op)

    operator.register_autograd(refuse, setup_context=keep_nothing)


def refuse_transforms(tensors: dict[str, Tensor | None]) -> None:
    """Refuses forward mode and torch.func for tensors that enter an operator.

    torch.library's operators have no forward mode (a tangent would silently become 0), and
    torch.func has no rule for them.

    Raises:
        RuntimeError: one of the tensors has a tangent, or is inside a transform.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        forward = torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
        # There is no public name for the second test.
        if forward or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            got = "one with a tangent" if forward else "one inside a transform of torch.func"
            fail(
                name,
                "a tensor of reverse-mode autograd",
                got,
                "use .backward() or torch.autograd.grad, or backend='reference'",
                error=RuntimeError,
            )


def no_gradients(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """What a backward returns for a list of constants.

    torch.library counts a list of tensors as that many arguments, and a list with a None as one.
    """
    return None if any(x is None for x in tensors) else [None] * len(tensors)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(op: str, upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
        return (upstream * gradient).to(gradient.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        refuse_second_derivative(ctx.op)


def scaled(op: str, upstream: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    """The upstream gradient times one by `of` that the forward formed."""
    # Without `of` the result would count as constant, and a second derivative as zero.
    product: Tensor = _Scaled.apply(op, upstream, gradient, of)
    return product
