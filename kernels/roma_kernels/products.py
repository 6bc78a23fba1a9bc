"""Matrix products with fp32 sums, and a count of all that an op really multiplied.

The launchers report here, so that skipped rows can be proved: `roma.testing.count_products`
listens.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """One launch of [rows, D] × [D, columns], or of one of the two transposes."""

    purpose: str
    """ "forward", "recompute", "dhidden" or "dweight"."""
    rows: int
    """Rows computed, padding of the last block included."""
    columns: int
    depth: int

    @property
    def flop(self) -> int:
        """Floating-point operations, two per multiply-add."""
        return 2 * self.rows * self.columns * self.depth


_LISTENERS: list[list[Products]] = []


@contextmanager
def listen() -> Iterator[list[Products]]:
    """Collects what is reported inside the block, by any thread: autograd has one for each GPU."""
    reports: list[Products] = []
    _LISTENERS.append(reports)
    try:
        yield reports
    finally:
        # By identity: two lists of equal reports are equal.
        _LISTENERS[:] = [listener for listener in _LISTENERS if listener is not reports]


def listening() -> bool:
    """Whether anyone counts: only then may a launcher wait for the device to learn a number."""
    return bool(_LISTENERS)


def report(purpose: str, rows: int, columns: int, depth: int) -> None:
    """Reports one launch."""
    for reports in _LISTENERS:
        reports.append(Products(purpose, rows, columns, depth))


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: then nothing can be read from the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def as_written(x: Tensor) -> Iterator[None]:
    """Work on the device of `x`, in the dtypes that the code names, whatever the process allows.

    The device is made the current one, autocast is off. tf32 and sums in 16 bits are not allowed:
    torch's switches for them belong to the process, so products of other threads that start
    meanwhile are exact too.
    """
    with ExitStack() as stack:
        if x.is_cuda:
            stack.enter_context(torch.cuda.device(x.device))
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(_EXACTNESS)
        yield


class _Exactness:
    """Switches products to exact at the first of several users, and back after the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                _switch_fp32(self._undo)
                _switch_16_bits(self._undo)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()


def _switch_fp32(undo: ExitStack) -> None:
    """By the switches that the process uses: torch refuses to read the older after the newer."""
    backends: Any = torch.backends
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        for matmul in (backends.cuda.matmul, backends.mkldnn.matmul):
            value = matmul.fp32_precision
            if value not in ("ieee", "none"):
                inherited = value == backends.fp32_precision
                undo.callback(setattr, matmul, "fp32_precision", "none" if inherited else value)
                matmul.fp32_precision = "ieee"
        return
    if precision != "highest":
        cpu = backends.mkldnn.matmul
        undo.callback(setattr, cpu, "fp32_precision", cpu.fp32_precision)
        undo.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")


# Whether sums of 16-bit products may be rounded to 16 bits between their parts.
_REDUCED = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def _switch_16_bits(undo: ExitStack) -> None:
    matmul: Any = torch.backends.cuda.matmul
    for name in _REDUCED:
        allowed = getattr(matmul, name)
        if allowed:
            split = getattr(matmul, f"{name}_split_k", None)
            undo.callback(setattr, matmul, name, allowed if split is None else (allowed, split))
            setattr(matmul, name, False)


_EXACTNESS = _Exactness()


def mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right, summed and returned in `dtype`."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    if widens("mm", left.device, left.dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


def mm_out(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes left·right to `out`; summed in fp32 (or float64), rounded once."""
    if left.dtype == out.dtype and (out.is_cuda or out.dtype in (torch.float32, torch.float64)):
        torch.mm(left, right, out=out)
    elif out.dtype == torch.float32 and widens("mm", left.device, left.dtype):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(mm(left, right, torch.promote_types(out.dtype, torch.float32)))


_ROWS = 1024  # of a product that has no room but a temporary


def addmm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left·right to an fp32 (or float64) total, in whose precision the sum is kept."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif widens("addmm", left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for sums, rows in zip(total.split(_ROWS), left.split(_ROWS), strict=True):
            sums += mm(rows, right, total.dtype)


@functools.cache
def widens(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library multiplies 16-bit matrices ("mm", "addmm") to fp32; no CPU's does.

    Versions of torch differ: in some, `addmm` takes no fp32 total. The first product asks once.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    small, total = (
        torch.zeros(16, 16, dtype=dtype, device=device),
        torch.zeros(16, 16, device=device),
    )
    try:
        if operation == "mm":
            torch.mm(small, small, out_dtype=torch.float32)
        else:
            torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except torch.OutOfMemoryError:
        raise  # says nothing of the library
    except (RuntimeError, TypeError) as why:
        if "CUBLAS_WORKSPACE_CONFIG" in str(why):
            raise  # strict determinism, which its own message explains
        return False
    return True
