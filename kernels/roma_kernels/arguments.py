"""Argument checks that every op shares: one message form, no hidden wait for a device.

Shapes, dtypes and devices are always checked. Values (token ranges, NaN, offsets) are read on the
CPU always; on another device a read would wait for it, so there they become a device-side
assertion, or the named `ValueError` when the environment says `ROMA_CHECK=1`.
"""

import math
import numbers
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from roma_kernels.errors import fail

_SOMETHING_BAD = (
    "a roma argument holds a bad value; run the same call outside torch.compile, and on a GPU with "
    "ROMA_CHECK=1 in the environment, to learn which"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, *, like: Tensor | None = None) -> None:
    """Checks that `value` is a tensor, on the device of `like` when that is given."""
    if not isinstance(value, Tensor):
        remedy = "convert it with torch.as_tensor"
        if isinstance(value, torch.nn.Module):
            remedy = "pass its .weight" if hasattr(value, "weight") else "pass a parameter of it"
        fail(name, "a tensor", type(value).__name__, remedy, error=TypeError)
    if hasattr(value, "full_tensor"):  # importing DTensor to ask for it takes half a second
        remedy = "call .full_tensor() on it, or .to_local() with vocab_group= if V is sharded"
        fail(name, "a plain tensor", type(value).__name__, remedy, error=TypeError)
    if like is not None and value.device != like.device:
        fail(
            name,
            f"a tensor on {like.device}",
            f"one on {value.device}",
            f"move it with .to('{like.device}')",
        )


def check_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Checks the dtype of `value`."""
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(value.dtype).removeprefix("torch.")
        fail(name, f"dtype {names}", got, "convert it with .to(dtype)")


def check_shape(
    name: str, value: Tensor, *shapes: tuple[str, tuple[int, ...]], remedy: str = ""
) -> None:
    """Checks that `value` has one of `shapes`, each given as (how the docs write it, the sizes)."""
    if any(_same(value.shape, sizes) for _, sizes in shapes):
        return
    expected = " or ".join(f"{letters} = {list(sizes)}" for letters, sizes in shapes)
    transposed = value.ndim == 2 and any(_same(value.shape[::-1], sizes) for _, sizes in shapes)
    fail(
        name,
        expected,
        str(list(value.shape)),
        "transpose it" if transposed else remedy or "reshape it",
    )


def _same(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    # One by one: torch.compile's sizes may be symbols, and tuples of symbols never compare equal.
    return len(shape) == len(sizes) and all(a == b for a, b in zip(shape, sizes, strict=True))


def check_positive(name: str, value: object, remedy: str) -> None:
    """Checks that `value` is a finite number > 0."""
    number = isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]  # a number by then
        fail(name, "a finite number > 0", repr(value), remedy)


def check_values(ok: Tensor, explain: Callable[[], str]) -> None:
    """Checks that all of the bool tensor `ok` holds; `explain` makes the message, on failure only.

    Costs no synchronisation: away from the CPU, and without `ROMA_CHECK=1`, the device asserts by
    itself; so it does wherever torch.compile traces, which cannot look at values.
    """
    if ok.device.type == "meta" or isinstance(ok, FakeTensor):
        return  # no values to look at
    told = os.environ.get("ROMA_CHECK") == "1" and not torch.compiler.is_compiling()
    if not (readable(ok) or told):
        torch._assert_async(ok.all(), _SOMETHING_BAD)
    elif not bool(ok.all()):
        raise ValueError(explain())


def readable(value: Tensor) -> bool:
    """Whether a value can be read without a wait: on the CPU, outside of tracing."""
    tracing = torch.compiler.is_compiling() or isinstance(value, FakeTensor)
    return value.device.type == "cpu" and not tracing
