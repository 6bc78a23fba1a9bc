"""Forward sweep over the vocabulary in Triton, and the merge of its partial sums.

    peak = max_v z_v ; total = Σ_v e^(z_v − peak) ; moment = Σ_v e^(z_v − peak)·z_v ; target = z_y

A tile [BLOCK_R, BLOCK_V] of logits exists in fp32 registers only. It writes peak, total and, for
the entropy, moment of each of its rows: 8 bytes (12) per row and vocabulary tile, not 4·BLOCK_V.
The tile that holds the target writes it, from the same accumulator. `_merge_kernel` folds the
vocabulary tiles. Any program may compute any tile, so the vocabulary is always split, and few rows
fill a chip as well as many.

For 2·R·D·V FLOP the multiprocessors pull 2·D·(R·⌈V/BLOCK_V⌉ + V·⌈R/BLOCK_R⌉) bytes of bf16 through
L2; memory gives W once per GROUP row tiles. No atomics: two runs are bitwise equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.gluon import launch as gluon
from roma_kernels.linear_logprob.rows import Head, Rows
from roma_kernels.linear_logprob.triton.gather import gather_rows
from roma_kernels.linear_logprob.triton.launch import (
    TRITON_DTYPES,
    compiler_options,
    gluon_takes,
    multiprocessors,
    programs,
    promoted,
    sources,
)
from roma_kernels.linear_logprob.triton.tile import _LOWEST, _logits, _product, _sums, _tile_at
from roma_kernels.linear_logprob.triton.tuning import Tile, chip, tile_for, tile_of
from roma_kernels.products import listening, report

# Rows swept per launch: bounds the partial sums (74 MiB at V = 152k; in tiles of 128 columns, with
# an entropy, 223) and the gathered hidden states (128 MiB at D = 4096), and still reads W only once
# per 26 ms of products on an H200.
SWEEP_ROWS = 16384


@triton.jit(
    do_not_specialize=["first", "per_token", "vocab_start", "R", "V"],
    do_not_specialize_on_alignment=[
        *("peak_ptr", "total_ptr", "moment_ptr", "target_ptr", "tokens_ptr", "scale_ptr"),
    ],
)
def _linear_logprob_fwd_kernel(
    peak_ptr,  # [⌈V/BLOCK_V⌉, R]
    total_ptr,  # the same
    moment_ptr,  # the same, or None without entropy
    target_ptr,  # [R], zeros
    hidden,  # [R, D], pointer or descriptor
    weight,  # [V, D], pointer or descriptor
    bias_ptr,  # [V] or None
    tokens_ptr,  # int64, one per token
    scale_ptr,  # 1/τ, one per token, or None
    num_tokens_ptr,  # 0-dim int64 or None: how many tokens are computed
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    first,  # the first row's number among all rows
    per_token,  # rows per token, K+1
    vocab_start,  # the first weight row's number among all tokens
    R,
    V,
    D,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    count = R
    if num_tokens_ptr is not None:
        count = tl.minimum(R, tl.maximum(tl.load(num_tokens_ptr) * per_token - first, 0)).to(
            tl.int32
        )
    row_tiles, vocab_tiles = tl.cdiv(count, BLOCK_R), tl.cdiv(V, BLOCK_V)
    for turn in tl.range(
        tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, vocab_tile = _tile_at(turn, row_tiles, vocab_tiles, GROUP)
        product = _product(
            hidden, weight, row_tile * BLOCK_R, vocab_tile * BLOCK_V, stride_hr, stride_hd,
            stride_wv, stride_wd, R, V, D, BLOCK_R, BLOCK_V, BLOCK_D, DESCRIPTORS, DTYPE,
        )  # fmt: skip
        rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = rows < count
        token_of = (first + rows) // per_token
        row_scale = tl.full((BLOCK_R,), scale, tl.float32)
        if scale_ptr is not None:
            row_scale = tl.load(scale_ptr + token_of, inside, other=1.0)
        z = _logits(product, bias_ptr, cols, V, softcap, SOFTCAP)

        peak, total, moment = _sums(z, row_scale, moment_ptr is not None)
        places = vocab_tile.to(tl.int64) * R + rows
        tl.store(peak_ptr + places, peak, inside)
        tl.store(total_ptr + places, total, inside)
        if moment_ptr is not None:
            tl.store(moment_ptr + places, moment, inside)
        # Within the tile, in 32 bits: half the instructions of a comparison of token ids.
        token = tl.load(tokens_ptr + token_of, inside, other=-1) - vocab_start
        local = (token - vocab_tile * BLOCK_V).to(tl.int32)
        here = tl.arange(0, BLOCK_V)[None, :] == local[:, None]
        target = tl.sum(tl.where(here, z, 0.0), 1) * row_scale
        found = (local >= 0) & (local < tl.minimum(V - vocab_tile * BLOCK_V, BLOCK_V))
        tl.store(target_ptr + rows, target, found & inside)


@triton.jit(
    do_not_specialize=["first", "per_token", "R", "parts"],
    do_not_specialize_on_alignment=[
        *("peak_out_ptr", "total_out_ptr", "moment_out_ptr"),
        *("peak_ptr", "total_ptr", "moment_ptr"),
    ],
)
def _merge_kernel(
    peak_out_ptr,  # [R]
    total_out_ptr,  # [R]
    moment_out_ptr,  # [R] or None
    peak_ptr,  # [parts, R]
    total_ptr,
    moment_ptr,
    num_tokens_ptr,
    first,
    per_token,
    parts,
    R,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Folds the parts of each row: e^(peak_i − peak) weighs part i."""
    count = R
    if num_tokens_ptr is not None:
        count = tl.minimum(R, tl.maximum(tl.load(num_tokens_ptr) * per_token - first, 0)).to(
            tl.int32
        )
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    peak = tl.full((BLOCK_R,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    moment = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        places = part.to(tl.int64)[:, None] * R + rows[None, :]
        inside = (part < parts)[:, None] & (rows < count)[None, :]
        peaks = tl.load(peak_ptr + places, inside, other=_LOWEST)
        higher = tl.maximum(peak, tl.max(peaks, 0))
        shrink = tl.exp(peak - higher)
        weights = tl.exp(peaks - higher[None, :])
        totals = tl.load(total_ptr + places, inside, other=0.0)
        total = total * shrink + tl.sum(totals * weights, 0)
        if moment_ptr is not None:
            moments = tl.load(moment_ptr + places, inside, other=0.0)
            # A part that a bias of the lowest number masks out has a moment of −∞ and no weight.
            moment = tl.where(shrink > 0, moment * shrink, 0.0)
            moment += tl.sum(tl.where(weights > 0, moments * weights, 0.0), 0)
        peak = higher
    tl.store(peak_out_ptr + rows, peak, rows < count)
    tl.store(total_out_ptr + rows, total, rows < count)
    if moment_ptr is not None:
        tl.store(moment_out_ptr + rows, moment, rows < count)


_MERGE_R, _MERGE_P = 32, 32


def sweep(rows: Rows, head: Head, sums: Tensor, plan: str = "triton") -> None:
    """Fills `sums` [3 or 4, R] with peak, total, target and (if four) moment of each row.

    A row that is not computed keeps its value; targets come as zeros. `plan`: "gluon" for the
    warp-specialised kernel, where it supports the call.
    """
    step = max(SWEEP_ROWS // rows.per_token, 1) * rows.per_token
    for first in range(0, rows.num_rows, step):
        _sweep_part(rows, head, sums[:, first : first + step], first, plan)


def _sweep_part(rows: Rows, head: Head, sums: Tensor, first: int, plan: str) -> None:
    count, (vocab, depth), device = sums.shape[1], head.weight.shape, sums.device
    states = gather_rows(rows, slice(first, first + count))
    specialised = plan == "gluon" and gluon_takes(states, head)
    tile = _tile(rows, head, sums, states, specialised)
    parts = triton.cdiv(vocab, tile.block_v)
    peaks, totals, *moments = sums.new_empty(len(sums) - 1, parts, count)
    moment = moments[0] if moments else None
    if specialised:
        gluon.sweep_tiles(
            (peaks, totals, moment, sums[2]), states, rows, head, first=first,
            multiprocessors=multiprocessors(device), stages=tile.num_stages, group=tile.group,
        )  # fmt: skip
    else:
        _launch((peaks, totals, moment, sums[2]), states, rows, head, first, tile)
    _merge_kernel[(triton.cdiv(count, _MERGE_R),)](
        sums[0], sums[1], sums[3] if moments else None, peaks, totals, moment,
        rows.num_tokens, first, rows.per_token, parts, count, BLOCK_R=_MERGE_R, BLOCK_P=_MERGE_P,
    )  # fmt: skip
    if listening():
        if rows.num_tokens is not None:
            count = min(max(int(rows.num_tokens) * rows.per_token - first, 0), count)
        report("forward", triton.cdiv(count, tile.block_r) * tile.block_r, vocab, depth)


def _tile(rows: Rows, head: Head, sums: Tensor, states: Tensor, specialised: bool) -> Tile:
    if specialised:
        return tile_of(chip(sums.device), "forward", "gluon")
    options = len(sums) == 4 or rows.row_scale is not None or head.has_options
    return tile_for("forward", states, head.weight, rows.num_rows, options=options)


def _launch(
    sums: tuple[Tensor, Tensor, Tensor | None, Tensor],
    states: Tensor,
    rows: Rows,
    head: Head,
    first: int,
    tile: Tile,
) -> None:
    """Peaks, totals and moments [⌈V/BLOCK_V⌉, R], targets [R], of R rows from `first` on."""
    (vocab, depth), count, device = head.weight.shape, len(states), states.device
    hidden, weight = sources(tile, states, head.weight)
    _linear_logprob_fwd_kernel[(programs(tile, count, vocab, device),)](
        *sums, hidden, weight, head.bias, rows.tokens, rows.row_scale, rows.num_tokens,
        *states.stride(), *head.weight.stride(),
        first, rows.per_token, head.start, count, vocab, depth, head.scale, head.softcap or 0.0,
        SOFTCAP=head.softcap is not None, DESCRIPTORS=tile.descriptors,
        DTYPE=TRITON_DTYPES[promoted(states, head.weight)],
        BLOCK_R=tile.block_r, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP=tile.group,
        FLATTEN=tile.persistent, **compiler_options(tile, device),
    )  # fmt: skip
