"""Plan "vendor": the vendor's product leaves a chunk of fp32 logits, a row kernel reads it at once.

    peak, total, moment, target ← those of the columns so far, and of this chunk
    dz = (g·1[v=y] − p·(g + e·(log p + H))) through softcap and 1/τ          p = e^(z/τ − lse)

A chunk (`tuning.Chunk`) is small enough to stay in the L2 cache between the two: 4 bytes per logit
are written and read there, and no product is ours. Any GPU whose library widens 16-bit products to
fp32 can run it. One program a row, fp32, columns in a fixed order: two runs are bitwise equal.

The host sizes the products, so it waits for the number of counted rows; while a CUDA graph is
captured it takes all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.rows import Active, Head, Rows
from roma_kernels.linear_logprob.triton.gather import gather_rows
from roma_kernels.linear_logprob.triton.launch import (
    COLUMNS,
    blank_dlogits,
    padded,
    promoted,
    registers,
)
from roma_kernels.linear_logprob.triton.tile import _dlogits, _logits, _sums
from roma_kernels.linear_logprob.triton.tuning import chunk_for
from roma_kernels.products import mm_out, report

_BLOCK_V, _WARPS = 4096, 4  # the number of warps that Triton takes where nothing is said


@triton.jit(
    do_not_specialize=["stride64", "first", "per_token", "vocab_start", "V"],
    do_not_specialize_on_alignment=[
        *("peak_ptr", "total_ptr", "moment_ptr", "target_ptr", "tokens_ptr", "scale_ptr"),
    ],
)
def _row_sums_kernel(
    peak_ptr,  # [R], read and written, as are the next three
    total_ptr,
    moment_ptr,  # or None
    target_ptr,
    logits_ptr,  # [R, 64·stride64] fp32, of which V columns are W h
    bias_ptr,  # [V] or None
    tokens_ptr,  # int64, one per token
    scale_ptr,  # 1/τ, one per token, or None
    stride64,  # in 64s, so that the compiler knows that whole vectors can be loaded
    first,  # the first row's number among all rows
    per_token,
    vocab_start,  # the first column's number among all tokens
    V,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    token_of = (first + one) // per_token
    row_scale = tl.full((1,), scale, tl.float32)
    if scale_ptr is not None:
        row_scale = tl.load(scale_ptr + token_of)
    local = (tl.load(tokens_ptr + token_of) - vocab_start).to(tl.int32)
    peak, total = tl.load(peak_ptr + one), tl.load(total_ptr + one)
    target = tl.load(target_ptr + one)
    moment = tl.zeros_like(total)
    if moment_ptr is not None:
        moment = tl.load(moment_ptr + one)
    columns = tl.cdiv(V, 64) * 64
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits = logits_ptr + row * (stride64 * 64) + cols
        product = tl.load(logits, cols < columns, other=0.0)[None, :]
        z = _logits(product, bias_ptr, cols, V, softcap, SOFTCAP)
        here = (cols[None, :] == local[:, None]) & (cols < V)[None, :]
        target += tl.sum(tl.where(here, z, 0.0), 1) * row_scale
        peak_here, total_here, moment_here = _sums(z, row_scale, moment_ptr is not None)
        higher = tl.maximum(peak, peak_here)
        before, after = tl.exp(peak - higher), tl.exp(peak_here - higher)
        total = total * before + total_here * after
        # Columns that a bias of the lowest number masks out: a moment of −∞ and no weight.
        moment = tl.where(before > 0, moment * before, 0.0)
        moment += tl.where(after > 0, moment_here * after, 0.0)
        peak = higher
    tl.store(peak_ptr + one, peak)
    tl.store(total_ptr + one, total)
    tl.store(target_ptr + one, target)
    if moment_ptr is not None:
        tl.store(moment_ptr + one, moment)


@triton.jit(
    do_not_specialize=["stride_dz64", "stride64", "vocab_start", "V"],
    do_not_specialize_on_alignment=[
        *("chosen_ptr", "tokens_ptr", "scale_ptr", "lse_ptr", "entropy_ptr", "dlogp_ptr"),
        "dentropy_ptr",
    ],
)
def _row_dlogits_kernel(
    dz_ptr,  # [A, 64·stride_dz64], from this chunk's first column on
    logits_ptr,  # [R, 64·stride64] fp32, of which V columns are W h
    bias_ptr,  # [V] or None
    chosen_ptr,  # [A] int64, which of the R rows; None: R = A, all of them
    tokens_ptr,  # [A] int64
    scale_ptr,  # [A] or None: 1/τ by row
    lse_ptr,  # [A]
    entropy_ptr,  # [A] or None
    dlogp_ptr,  # [A]
    dentropy_ptr,  # [A] or None
    loss_scale_ptr,  # 0-dim or None
    stride_dz64,
    stride64,
    vocab_start,
    V,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = i
    if chosen_ptr is not None:
        row = tl.load(chosen_ptr + i)
    one = i + tl.arange(0, 1)
    row_scale = tl.full((1,), scale, tl.float32)
    if scale_ptr is not None:
        row_scale = tl.load(scale_ptr + one)
    local = (tl.load(tokens_ptr + one) - vocab_start).to(tl.int32)
    by_logit = row_scale
    if loss_scale_ptr is not None:
        by_logit *= tl.load(loss_scale_ptr)
    lse, g = tl.load(lse_ptr + one), tl.load(dlogp_ptr + one) * by_logit
    e, entropy = g, g
    if dentropy_ptr is not None:
        e, entropy = tl.load(dentropy_ptr + one) * by_logit, tl.load(entropy_ptr + one)
    columns = tl.cdiv(V, 64) * 64
    for start in range(0, columns, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        logits = logits_ptr + row * (stride64 * 64) + cols
        product = tl.load(logits, cols < columns, other=0.0)[None, :]
        z = _logits(product, bias_ptr, cols, V, softcap, SOFTCAP)
        target = cols[None, :] == local[:, None]
        dz = _dlogits(
            z, target, lse, row_scale, g, e, entropy, softcap, dentropy_ptr is not None, SOFTCAP
        )
        places = dz_ptr + i * (stride_dz64 * 64) + cols[None, :]
        tl.store(places, dz.to(dz_ptr.dtype.element_ty), (cols < columns)[None, :])


def sweep(rows: Rows, head: Head, sums: Tensor) -> None:
    """Fills `sums` [3 or 4, R] with peak, total, target and (if four) moment of each row."""
    rows = rows.trimmed()
    sums = sums[:, : rows.num_rows]
    start_sums(sums)
    chunk, (vocab, depth) = chunk_for(sums.device), head.weight.shape
    dtype = promoted(rows.hidden, head.weight)
    room = blank_logits(sums, min(chunk.rows, rows.num_rows), min(chunk.columns, vocab))
    for first in range(0, rows.num_rows, chunk.rows):
        part = sums[:, first : first + chunk.rows]
        states = gather_rows(rows, slice(first, first + part.shape[1])).to(dtype)
        for start in range(0, vocab, chunk.columns):
            piece = head.part(slice(start, start + chunk.columns), dtype)
            logits = room[: len(states), : len(piece.weight)]
            mm_out(logits, states, piece.weight.T)
            row_sums(part, logits, piece, rows, first)
    report("forward", rows.num_rows, vocab, depth)


def dlogits(active: Active, head: Head) -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries."""
    count, (vocab, depth) = len(active.states), head.weight.shape
    dz = blank_dlogits(active.states, count, vocab)
    chunk = chunk_for(dz.device)
    room = blank_logits(active.lse, min(chunk.rows, count), min(chunk.columns, vocab))
    for first in range(0, count, chunk.rows):
        block = active.part(slice(first, first + chunk.rows))
        for start in range(0, vocab, chunk.columns):
            piece = head.part(slice(start, start + chunk.columns), active.states.dtype)
            logits = room[: len(block.states), : len(piece.weight)]
            mm_out(logits, block.states, piece.weight.T)
            row_dlogits(dz[first:, start:], logits, piece, block)
    report("recompute", count, vocab, depth)
    return dz


def start_sums(sums: Tensor) -> None:
    """Peak, total, target and moment of no column."""
    sums.zero_()
    sums[0] = torch.finfo(sums.dtype).min


def blank_logits(like: Tensor, rows: int, vocab: int) -> Tensor:
    """Room for fp32 logits [rows, vocab] in rows of whole 64 columns."""
    return like.new_empty(rows, padded(vocab), dtype=torch.float32)[:, :vocab]


def row_sums(sums: Tensor, logits: Tensor, head: Head, rows: Rows, first: int) -> None:
    """Adds the columns `logits` [R, V] of a head, of rows from `first` on, to their sums."""
    _row_sums_kernel[(len(logits),)](
        sums[0], sums[1], sums[3] if len(sums) == 4 else None, sums[2], logits, head.bias,
        rows.tokens, rows.row_scale, logits.stride(0) // COLUMNS, first, rows.per_token,
        head.start, logits.shape[1], head.scale, head.softcap or 0.0,
        SOFTCAP=head.softcap is not None, BLOCK_V=_BLOCK_V, **registers(_WARPS, logits.device),
    )  # fmt: skip


def row_dlogits(
    dz: Tensor, logits: Tensor, head: Head, active: Active, chosen: Tensor | None = None
) -> None:
    """Writes dz [A, V] of the columns `logits` [R, V] of a head, R = A or of the chosen rows."""
    _row_dlogits_kernel[(len(active.states),)](
        dz, logits, head.bias, chosen, active.tokens, active.row_scale,
        active.lse, active.entropy, active.dlogp, active.dentropy, active.loss_scale,
        dz.stride(0) // COLUMNS, logits.stride(0) // COLUMNS, head.start, logits.shape[1],
        head.scale, head.softcap or 0.0, SOFTCAP=head.softcap is not None, BLOCK_V=_BLOCK_V,
        **registers(_WARPS, logits.device),
    )  # fmt: skip
