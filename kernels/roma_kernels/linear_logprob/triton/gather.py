"""Rows out of their padded positions and back, in Triton: a copy, no arithmetic.

Reads and writes D elements a row each way; the head's product does 2·V FLOP for each of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.rows import Rows


@triton.jit
def _place(index_ptr, row, per_token, stride, M):
    """Whether a row is of the clean image, and where it begins: in hidden, and in the views."""
    token, image = row // per_token, row % per_token
    position = token
    if index_ptr is not None:
        position = tl.load(index_ptr + token)
    return image == 0, position * stride, ((image - 1) * M + position) * stride


@triton.jit(
    do_not_specialize=["first", "per_token", "M"],
    do_not_specialize_on_alignment=["rows_ptr", "index_ptr"],
)
def _gather_rows_kernel(
    states_ptr,  # [A, D]
    hidden_ptr,  # [M, D]
    views_ptr,  # [K, M, D] or None
    rows_ptr,  # [A] int64, or None: first, first + 1, …
    index_ptr,  # [n] int64 or None
    num_active_ptr,  # 0-dim int64 or None: rows beyond are zeros
    first,
    per_token,
    stride,
    M,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = first + i
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i)
    needed = True
    if num_active_ptr is not None:
        needed = i < tl.load(num_active_ptr)
    # Two masked loads, not a pointer of two bases, which Triton 3.6 does not compile for AMD.
    clean, at, at_view = _place(index_ptr, row, per_token, stride, M)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < D) & needed
        state = tl.load(hidden_ptr + at + d, inside & clean, other=0.0)
        if views_ptr is not None:
            view = tl.load(views_ptr + at_view + d, inside & (clean == 0), other=0.0)
            state = tl.where(clean, state, view)
        tl.store(states_ptr + i * D + d, state, d < D)


@triton.jit(
    do_not_specialize=["per_token", "M"],
    do_not_specialize_on_alignment=["rows_ptr", "index_ptr"],
)
def _scatter_rows_kernel(
    dhidden_ptr,  # [M, D], zeros
    dviews_ptr,  # [K, M, D], zeros, or None
    dstates_ptr,  # [A, D] fp32
    rows_ptr,  # [A] int64
    index_ptr,  # [n] int64 or None
    num_active_ptr,  # 0-dim int64 or None
    per_token,
    stride,
    M,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    needed = True
    if num_active_ptr is not None:
        needed = i < tl.load(num_active_ptr)
    clean, at, at_view = _place(index_ptr, row, per_token, stride, M)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < D) & needed
        dstate = tl.load(dstates_ptr + i * D + d, d < D, other=0.0)
        dstate = dstate.to(dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + at + d, dstate, inside & clean)
        if dviews_ptr is not None:
            tl.store(dviews_ptr + at_view + d, dstate, inside & (clean == 0))


BLOCK_D = 1024


def gather_rows(rows: Rows, chosen: Tensor | slice, num_active: Tensor | None = None) -> Tensor:
    """Hidden states [A, D] of the chosen rows; zeros from row num_active on."""
    hidden, views = rows.hidden, rows.view_hidden
    if isinstance(chosen, slice):
        if views is None and rows.index is None:
            return hidden[chosen]
        first, count, numbers = chosen.start, chosen.stop - chosen.start, None
    else:
        first, count, numbers = 0, len(chosen), chosen
    hidden = hidden.contiguous()
    views = None if views is None else views.contiguous()
    size = hidden.shape[1]
    states = hidden.new_empty(count, size)
    if count:
        _gather_rows_kernel[(count,)](
            states, hidden, views, numbers, rows.index, num_active, first, rows.per_token, size,
            len(hidden), size, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return states


def scatter_rows(
    rows: Rows, chosen: Tensor, num_active: Tensor | None, dstates: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients by hidden and view_hidden, zeros but on the chosen rows."""
    dhidden, dviews = zero_gradients(rows)
    scatter_rows_into(dhidden, dviews, rows, chosen, num_active, dstates)
    return dhidden, dviews


def zero_gradients(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Zeros [M, D] and [K, M, D]."""
    hidden, views = rows.hidden, rows.view_hidden
    return hidden.new_zeros(hidden.shape), None if views is None else views.new_zeros(views.shape)


def scatter_rows_into(
    dhidden: Tensor,
    dviews: Tensor | None,
    rows: Rows,
    chosen: Tensor,
    num_active: Tensor | None,
    dstates: Tensor,
) -> None:
    """Writes `dstates` [A, D] to the positions of the chosen rows."""
    size = dhidden.shape[1]
    if len(chosen):
        _scatter_rows_kernel[(len(chosen),)](
            dhidden, dviews, dstates, chosen, rows.index, num_active, rows.per_token, size,
            len(dhidden), size, BLOCK_D=BLOCK_D,
        )  # fmt: skip
