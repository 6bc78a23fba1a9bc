"""Triton's interpreter, repaired: its tl.dot multiplies the bit patterns of bfloat16 as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Make tl.dot widen bfloat16 operands to float32, whose products are then exact."""
    InterpreterBuilder.create_dot = _dot


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *how: Any
) -> TensorHandle:
    product = np.matmul(_widen(a), _widen(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _widen(x: TensorHandle) -> np.ndarray:
    """The interpreter keeps a bfloat16 as the upper half of a float32's bits."""
    if x.dtype != tl.bfloat16:
        return x.data
    return (x.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
