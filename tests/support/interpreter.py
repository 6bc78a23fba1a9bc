"""Triton's interpreter as the tests need it: right in bfloat16, and four times faster."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)


def repair() -> None:
    """Make tl.dot widen bfloat16 operands, and its calls cheap."""
    InterpreterBuilder.create_dot = _dot
    InterpretedFunction.__call__ = _call
    for package in (tl, tl.tensor, tl.math, tl.core, tl.core.tensor_descriptor_base):
        _builtins(package)
    interpreter._patch_builtin = _patch_builtin
    _launch.__code__ = _launch.__code__.replace(co_stacksize=2**16)
    GridExecutor.__call__ = _launch


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: Any
) -> TensorHandle:
    # As shipped it multiplies the bit patterns of bfloat16 as integers. In float32 the products are
    # exact, as they are on a chip.
    product = np.matmul(_widen(a), _widen(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _widen(x: TensorHandle) -> np.ndarray:
    """The interpreter keeps a bfloat16 as the upper half of a float32's bits."""
    if x.dtype != tl.bfloat16:
        return x.data
    return (x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


# As shipped the interpreter looks through all of triton.language whenever a kernel is launched or a
# device function called, to put the interpreted form of each builtin in its place: nine tenths of
# the time of a small kernel. The names of the builtins never change, and what is in place can stay.


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    if any(tl.core.is_builtin(module.load) for module in _language(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


@functools.cache
def _language(function: Any) -> list[Any]:
    """triton.language and its core, as far as a device function sees them."""
    return [x for x in function.__globals__.values() if x is tl or x is tl.core]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name in _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


@functools.cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


_shipped_launch = GridExecutor.__call__


def _launch(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
    # CPython 3.11 keeps frames in chunks of 16 KiB, and a loop that calls from the last frame of a
    # chunk maps and unmaps the next one at every call: half of all the time, if a kernel happens to
    # start there. A frame that claims 2^16 slots brings a chunk of 1 MiB, room for all below it.
    return _shipped_launch(self, *args, **kwargs)
