"""Rows in and out of their padded places, in Triton: a copy, no arithmetic.

Reads and writes D elements a row each way; W's product does 2·V FLOP for each of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.rows import Rows


@triton.jit
def _place_of(hidden_ptr, views_ptr, index_ptr, number, views, stride, stride_k):
    """Where row `number` stands: pointer to its first element."""
    token, view = number // views, number % views
    place = token
    if index_ptr is not None:
        place = tl.load(index_ptr + token)
    pointer = hidden_ptr + place * stride
    if views_ptr is not None:
        if view > 0:
            pointer = views_ptr + (view - 1) * stride_k + place * stride
    return pointer


@triton.jit(do_not_specialize=["first"])
def _take_rows_kernel(
    states_ptr,  # [A, D]
    hidden_ptr,  # [M, D]
    views_ptr,  # [K, M, D] or None
    chosen_ptr,  # [A] int64, or None: first, first + 1, …
    index_ptr,
    wanted_ptr,  # 0-dim int64 or None: rows beyond are zeros
    first,
    views,
    stride,
    stride_k,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    number = first + i
    if chosen_ptr is not None:
        number = tl.load(chosen_ptr + i)
    wanted = True
    if wanted_ptr is not None:
        wanted = i < tl.load(wanted_ptr)
    source = _place_of(hidden_ptr, views_ptr, index_ptr, number, views, stride, stride_k)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        state = tl.load(source + d, (d < D) & wanted, other=0.0)
        tl.store(states_ptr + i * D + d, state, d < D)


@triton.jit
def _give_rows_kernel(
    dhidden_ptr,  # [M, D], zeros
    dviews_ptr,  # [K, M, D], zeros, or None
    dstates_ptr,  # [A, D] fp32
    chosen_ptr,  # [A] int64
    index_ptr,
    wanted_ptr,
    views,
    stride,
    stride_k,
    D,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    number = tl.load(chosen_ptr + i)
    wanted = True
    if wanted_ptr is not None:
        wanted = i < tl.load(wanted_ptr)
    target = _place_of(dhidden_ptr, dviews_ptr, index_ptr, number, views, stride, stride_k)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        dstate = tl.load(dstates_ptr + i * D + d, d < D)
        tl.store(target + d, dstate.to(target.dtype.element_ty), (d < D) & wanted)


BLOCK_D = 1024


def take_rows(rows: Rows, chosen: Tensor | slice, wanted: Tensor | None = None) -> Tensor:
    """Hidden states of the chosen rows, [A, D]; zeros from the row `wanted` on."""
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
        _take_rows_kernel[(count,)](
            states, hidden, views, numbers, rows.index, wanted, first, rows.views, size,
            hidden.numel(), size, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return states


def give_rows(
    rows: Rows, chosen: Tensor, wanted: Tensor | None, dstates: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients by hidden and view_hidden, zero but on the chosen rows."""
    dhidden, dviews = zero_gradients(rows)
    put_rows(rows, chosen, wanted, dstates, dhidden, dviews)
    return dhidden, dviews


def zero_gradients(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Zeros [M, D] and [K, M, D]."""
    hidden, views = rows.hidden, rows.view_hidden
    return hidden.new_zeros(hidden.shape), None if views is None else views.new_zeros(views.shape)


def put_rows(
    rows: Rows,
    chosen: Tensor,
    wanted: Tensor | None,
    dstates: Tensor,
    dhidden: Tensor,
    dviews: Tensor | None,
) -> None:
    """Writes `dstates` [A, D] to the places of the chosen rows."""
    size = dhidden.shape[1]
    if len(chosen):
        _give_rows_kernel[(len(chosen),)](
            dhidden, dviews, dstates, chosen, rows.index, wanted, rows.views, size,
            dhidden.numel(), size, BLOCK_D=BLOCK_D,
        )  # fmt: skip
