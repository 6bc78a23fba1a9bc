"""Triton's interpreter as the tests need it: right in bfloat16, and many times faster."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from support import recorder
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    ASTTransformer,
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    ScanOps,
    TensorHandle,
    interpreter_builder,
    interpreter_semantic,
)


def repair() -> None:
    """Make tl.dot widen bfloat16 operands, and launches and calls cheap."""
    InterpreterBuilder.create_dot = _dot
    InterpretedFunction.__call__ = _call
    interpreter._patch_attr = _patch_attr
    interpreter.interpreted_range = _range  # whence every kernel's module gets it
    ASTTransformer.visit_Name = _visit_name
    interpreter._get_np_dtype = _numpy_type
    TensorHandle.__init__ = _init_handle
    InterpreterBuilder.binary_op = _binary
    tl.pointer_type.primitive_bitwidth = 64
    _launch.__code__ = _launch.__code__.replace(co_stacksize=2**16)
    InterpretedFunction.run = _launch


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


_numpy_types: dict[str, np.dtype] = {}
_shipped_numpy_type = interpreter._get_np_dtype


def _numpy_type(kind: tl.dtype) -> np.dtype:
    # As shipped it builds a table of all types whenever one is asked for.
    if kind.name not in _numpy_types:
        _numpy_types[kind.name] = _shipped_numpy_type(kind)
    return _numpy_types[kind.name]


def _init_handle(
    self: TensorHandle, data: np.ndarray, dtype: tl.dtype, attr: dict[str, Any] | None = None
) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if data.itemsize > 1 and data.itemsize * 8 > dtype.primitive_bitwidth:
        raise ValueError(f"numpy's {data.dtype} is wider than {dtype}")


def _binary(
    self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, operation: np.ufunc
) -> TensorHandle:
    output, kind = operation(lhs.data, rhs.data), lhs.dtype.scalar
    if output.itemsize > 1 and output.itemsize * 8 > kind.primitive_bitwidth:
        output = output.astype(_numpy_type(kind))
    return TensorHandle(output, kind)


@functools.cache
def _install() -> None:
    """Put the interpreted form of each builtin in its place, for good.

    As shipped it happens whenever a kernel is launched or a device function called.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for name in ("__index__", "__bool__", "__repr__", "__str__"):
        setattr(tl.tensor, name, recorder.reads_value(getattr(tl.tensor, name)))
    tl.tensor.T = property(_transposed)
    for name in ("load", "store"):
        setattr(
            interpreter_semantic, name, recorder.tests_presence(getattr(interpreter_semantic, name))
        )
    for language in (tl, tl.core):
        language.reduce = _reduce
        language.associative_scan = _scan
        language.range = _range


def _patch_attr(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    scope.set_attr(place, name, _interpreted(member))


@functools.cache
def _interpreted(member: Callable[..., Any]) -> Callable[..., Any]:
    def builtin(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter_semantic
        return member(*args, **kwargs)

    return recorder.recorded(builtin)


def _transposed(x: tl.tensor) -> tl.tensor:
    axes = tuple(reversed(range(len(x.shape))))
    shape = [x.shape[axis].value for axis in axes]
    handle = interpreter_semantic.builder.create_trans(x.handle, axes)
    return tl.tensor(handle, tl.block_type(x.dtype, shape))


def _visit_name(self: ASTTransformer, node: ast.Name) -> ast.Name:
    if node.id == "range":
        node.id = "interpreted_range"
    return node


def _range(*bounds: Any, **_: Any) -> Iterator[tl.tensor]:
    """Numbers of a loop as tensors, which they are in a compiled kernel."""
    wide = any(isinstance(x, tl.tensor) and x.dtype == tl.int64 for x in bounds)
    kind = tl.int64 if wide else tl.int32
    for i in range(*bounds):
        yield interpreter_semantic.scalar_constant(i, kind)


def _reduce(x: Any, axis: Any, combine: Any, keep_dims: bool = False, **_: Any) -> Any:
    return recorder.reduce(ReduceOps, x, axis, combine, keep_dims)


def _scan(x: Any, axis: Any, combine: Any, reverse: bool = False, **_: Any) -> Any:
    return recorder.reduce(ScanOps, x, axis, combine, reverse)


def _call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    _install()
    return _device_function(self)(*args, **kwargs)


@functools.cache
def _device_function(function: InterpretedFunction) -> Callable[..., Any]:
    return recorder.recorded(function.rewrite())


@functools.cache
def _signature(function: InterpretedFunction) -> tuple[inspect.Signature, frozenset[str]]:
    """The arguments, and which of them are constants of the compiled kernel."""
    shipped = GridExecutor(function.fn, function.arg_names, ())
    return inspect.signature(function.fn), frozenset(shipped.constexprs)


def _launch(
    self: InterpretedFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
) -> None:
    """Run a kernel on tensors of the host, as GridExecutor does.

    A float becomes a tensor in float32, as it does in a compiled kernel. CPython 3.11 keeps frames
    in chunks of 16 KiB, and a loop that calls from the last frame of a chunk maps and unmaps the
    next one at every call: half of all the time, if a kernel happens to start there. A frame that
    claims 2^16 slots, as this one does, brings a chunk of 1 MiB, room for all below it.
    """
    if warmup:
        return
    _install()
    function = self.rewrite()
    signature, constants = _signature(self)
    known = {name: x for name, x in kwargs.items() if name in signature.parameters}
    arguments = {
        name: x if name in constants else _argument(x)
        for name, x in signature.bind(*args, **known).arguments.items()
    }
    grid = grid(arguments) if callable(grid) else grid
    grid = (*grid, *(1,) * (3 - len(grid)))
    interpreter_builder.set_grid_dim(*grid)
    # A chip does not warn of ∞ − ∞ in a masked lane either.
    with np.errstate(all="ignore"):
        for place in np.ndindex(*grid):
            interpreter_builder.set_grid_idx(*place)
            function(**arguments)


def _argument(x: Any) -> Any:
    if isinstance(x, float):
        return tl.tensor(TensorHandle(np.array([x], np.float32), tl.float32), tl.float32)
    if isinstance(x, torch.Tensor):
        assert x.is_cpu
        kind = _pointer_type(x.dtype)
        return tl.tensor(TensorHandle(np.array([x.data_ptr()], np.uint64), kind), kind)
    return interpreter._implicit_cvt(x)


@functools.cache
def _pointer_type(dtype: torch.dtype) -> tl.pointer_type:
    return interpreter._implicit_cvt(torch.empty(0, dtype=dtype)).type
