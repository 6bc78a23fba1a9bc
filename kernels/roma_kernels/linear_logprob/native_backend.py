"""The compiled CPU back end (csrc/): logits stay in registers, in fp32, whatever the inputs' dtype.

bf16 states on a bf16 head are multiplied by the CPU's bf16 units where it has them, everything else
in fp32. The results do not depend on the number of threads: every sum is taken by one thread, in an
order that the sizes alone decide. There are torch.get_num_threads() threads, for one call each.
"""

import ctypes

import torch
from torch import Tensor

from roma_kernels.linear_logprob import torch_backend
from roma_kernels.linear_logprob.rows import Active, Head, Kernels, Rows
from roma_kernels.native import LEVELS, level, native
from roma_kernels.products import report

# Rows swept at a time: their states are there twice, gathered and packed.
SWEEP_BYTES = 8 * 2**20
_LEAST_ROWS = 1024
_FLOP_PER_THREAD = 10**7  # what a thread computes while another one is started
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_pointer, _int64 = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", _pointer),
        ("row_stride", _int64),
        ("column_stride", _int64),
        ("dtype", ctypes.c_int32),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("states", _Matrix),
        ("count", _int64),
        ("depth", _int64),
        ("tokens", _pointer),
        ("scale", _pointer),
    ]


class _Head(ctypes.Structure):
    _fields_ = [
        ("weight", _Matrix),
        ("vocab", _int64),
        ("bias", _pointer),
        ("softcap", ctypes.c_float),
        ("start", _int64),
    ]


class _Upstream(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("lse", "entropy", "dlogp", "dentropy")]


def _matrix(x: Tensor) -> _Matrix:
    return _Matrix(x.data_ptr(), *x.stride(), _DTYPES[x.dtype])


def _rows(states: Tensor, tokens: Tensor, scale: Tensor) -> _Rows:
    return _Rows(_matrix(states), *states.shape, tokens.data_ptr(), scale.data_ptr())


def _head(head: Head, bias: Tensor | None) -> _Head:
    pointer = None if bias is None else bias.data_ptr()
    return _Head(_matrix(head.weight), len(head.weight), pointer, head.softcap or 0.0, head.start)


def _plain(x: Tensor | None) -> Tensor | None:
    """In fp32 and without gaps."""
    return None if x is None else x.float().contiguous()


def _call(name: str, flop: int, *arguments: object) -> None:
    threads = min(torch.get_num_threads(), 1 + flop // _FLOP_PER_THREAD)
    function = getattr(native().library, name)
    if function(ctypes.c_int32(level()), ctypes.c_int32(threads), *arguments):
        raise MemoryError(f"{name}: no memory for packed operands; use fewer rows")


def _filled(rows: int) -> int:
    """Rows that are computed for `rows`: whole vectors."""
    block = native().library.roma_row_block(level())
    return -(-rows // block) * block


def sweep(rows: Rows, head: Head, sums: Tensor) -> None:
    """Fills `sums` [3 or 4, R] with peak, total, target and (if four) moment of each row."""
    rows = rows.trimmed()
    vocab, depth = head.weight.shape
    bias = _plain(head.bias)
    numbers = torch.arange(rows.num_rows)
    step = max(SWEEP_BYTES // (depth * rows.hidden.itemsize), _LEAST_ROWS)
    for start in range(0, rows.num_rows, step):
        block = numbers[start : start + step]
        token_of = block // rows.per_token
        if rows.view_hidden is None and rows.index is None:
            states = rows.hidden[start : start + step]
        else:
            states = torch_backend.gather(rows, block, None)
        tokens = rows.tokens[token_of]
        scale = torch.full(block.shape, head.scale, dtype=torch.float32)
        if rows.row_scale is not None:
            scale = rows.row_scale[token_of].float()
        c_rows, c_head = _rows(states, tokens, scale), _head(head, bias)
        part = sums[:, start:]
        _call(
            "roma_sweep", 2 * len(block) * vocab * depth, ctypes.byref(c_rows),
            ctypes.byref(c_head), _pointer(part.data_ptr()), _int64(sums.stride(0)),
            ctypes.c_int32(len(sums) == 4),
        )  # fmt: skip
    report("forward", _filled(rows.num_rows), vocab, depth)


def dlogits(active: Active, head: Head) -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries."""
    count, (vocab, depth) = len(active.states), head.weight.shape
    # Column by column, as the kernel walks; padded, so that it writes whole vectors.
    dz = active.states.new_empty(vocab, _filled(count))
    scale, bias = active.row_scale, _plain(head.bias)
    if scale is None:
        scale = torch.full((count,), head.scale)
    tensors = [_plain(x) for x in (active.lse, active.entropy, active.dlogp, active.dentropy)]
    upstream = _Upstream(*(None if x is None else x.data_ptr() for x in tensors))
    tokens, scale = active.tokens.contiguous(), scale.float().contiguous()
    c_rows, c_head = _rows(active.states, tokens, scale), _head(head, bias)
    _call(
        "roma_dlogits", 2 * count * vocab * depth, ctypes.byref(c_rows), ctypes.byref(c_head),
        ctypes.byref(upstream), _pointer(dz.data_ptr()), _int64(dz.stride(0)),
        ctypes.c_int32(_DTYPES[dz.dtype]),
    )  # fmt: skip
    report("recompute", _filled(count), vocab, depth)
    return dz[:, :count].T


def mm_out(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes left·right to `out`; summed in fp32, rounded once."""
    if _writable(out):
        _multiply(out, left, right, accumulate=False)
    else:
        exact = torch.empty(out.shape)
        _multiply(exact, left, right, accumulate=False)
        out.copy_(exact)


def addmm_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left·right to an fp32 total."""
    if _writable(total):
        _multiply(total, left, right, accumulate=True)
    else:
        exact = torch.empty(total.shape)
        _multiply(exact, left, right, accumulate=False)
        total.add_(exact)


def _writable(out: Tensor) -> bool:
    return out.dtype in (torch.float32, torch.bfloat16) and out.stride(1) == 1


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    (m, k), n = left.shape, right.shape[1]
    c_left, c_right = _matrix(left), _matrix(right)
    _call(
        "roma_multiply", 2 * m * n * k, _int64(m), _int64(n), _int64(k), ctypes.byref(c_left),
        ctypes.byref(c_right), _pointer(out.data_ptr()), _int64(out.stride(0)),
        ctypes.c_int32(_DTYPES[out.dtype]), ctypes.c_int32(accumulate),
    )  # fmt: skip


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """bf16 where both are bf16 and the CPU multiplies that; else fp32."""
    pairs = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if pairs and LEVELS[level()] == "avx512_bf16" else torch.float32


KERNELS = Kernels(
    sweep=sweep,
    gather=torch_backend.gather,
    scatter=torch_backend.scatter,
    dlogits=dlogits,
    mm_out=mm_out,
    addmm_=addmm_,
    dtype=product_dtype,
    workspace=torch_backend.WORKSPACE_BYTES,
    least_columns=torch_backend.VOCAB_TILE,
)
