"""Gradient by a tile of logits, in Triton: the product once more, and dz from its registers.

    dz = g·(1[v=y] − p) − e·p·(log p + H) ;  dz ← dz·(1 − (z/s)²)·(1/τ)        p = e^(z − lse)

The logits are recomputed by the code of the forward sweep, in fp32, and stay on chip: 2 bytes per
logit are written (bf16), and read twice by the vendor's two products.
Two runs are bitwise equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.gluon import launch as gluon
from roma_kernels.linear_logprob.rows import Active, Head
from roma_kernels.linear_logprob.triton.launch import (
    COLUMNS,
    TRITON_DTYPES,
    blank_dlogits,
    compiler_options,
    gluon_takes,
    multiprocessors,
    programs,
    promoted,
    sources,
)
from roma_kernels.linear_logprob.triton.tile import _dlogits, _logits, _product, _tile_at
from roma_kernels.linear_logprob.triton.tuning import Tile, chip, tile_for, tile_of
from roma_kernels.products import report


@triton.jit(
    do_not_specialize=["stride_dz64", "vocab_start", "A", "V"],
    do_not_specialize_on_alignment=[
        *("tokens_ptr", "scale_ptr", "lse_ptr", "entropy_ptr", "dlogp_ptr", "dentropy_ptr"),
    ],
)
def _dlogits_kernel(
    dz_ptr,  # [A, 64·stride_dz64], of which V columns count
    hidden,  # [A, D], pointer or descriptor
    weight,  # [V, D], pointer or descriptor
    bias_ptr,  # [V] or None
    tokens_ptr,  # [A] int64
    scale_ptr,  # [A] or None: 1/τ by row
    lse_ptr,  # [A]
    entropy_ptr,  # [A] or None
    dlogp_ptr,  # [A]
    dentropy_ptr,  # [A] or None
    loss_scale_ptr,  # 0-dim or None
    stride_dz64,  # in 64s, so that the compiler knows that whole vectors can be stored
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    vocab_start,
    A,
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
    row_tiles, vocab_tiles = tl.cdiv(A, BLOCK_R), tl.cdiv(V, BLOCK_V)
    for turn in tl.range(
        tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        row_tile, vocab_tile = _tile_at(turn, row_tiles, vocab_tiles, GROUP)
        product = _product(
            hidden, weight, row_tile * BLOCK_R, vocab_tile * BLOCK_V, stride_hr, stride_hd,
            stride_wv, stride_wd, A, V, D, BLOCK_R, BLOCK_V, BLOCK_D, DESCRIPTORS, DTYPE,
        )  # fmt: skip
        rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = rows < A
        row_scale = tl.full((BLOCK_R,), scale, tl.float32)
        if scale_ptr is not None:
            row_scale = tl.load(scale_ptr + rows, inside, other=1.0)
        z = _logits(product, bias_ptr, cols, V, softcap, SOFTCAP)

        lse = tl.load(lse_ptr + rows, inside, other=0.0)
        by_logit = row_scale
        if loss_scale_ptr is not None:
            by_logit *= tl.load(loss_scale_ptr)
        g = tl.load(dlogp_ptr + rows, inside, other=0.0) * by_logit
        e, entropy = g, g
        if dentropy_ptr is not None:
            e = tl.load(dentropy_ptr + rows, inside, other=0.0) * by_logit
            entropy = tl.load(entropy_ptr + rows, inside, other=0.0)
        token = tl.load(tokens_ptr + rows, inside, other=-1) - vocab_start
        local = (token - vocab_tile * BLOCK_V).to(tl.int32)
        target = tl.arange(0, BLOCK_V)[None, :] == local[:, None]
        dz = _dlogits(
            z, target, lse, row_scale, g, e, entropy, softcap, dentropy_ptr is not None, SOFTCAP
        )
        places = rows.to(tl.int64)[:, None] * (stride_dz64 * 64) + cols[None, :]
        stored = inside[:, None] & (cols < stride_dz64 * 64)[None, :]
        tl.store(dz_ptr + places, dz.to(dz_ptr.dtype.element_ty), stored)


def dlogits(active: Active, head: Head, plan: str = "triton") -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries; `plan` as in `sweep`."""
    count, (vocab, depth) = len(active.states), head.weight.shape
    dz = blank_dlogits(active.states, count, vocab)
    if plan == "gluon" and gluon_takes(active.states, head):
        tile = tile_of(chip(dz.device), "dlogits", "gluon")
        gluon.dlogits(
            dz, active, head, multiprocessors=multiprocessors(dz.device),
            stages=tile.num_stages, group=tile.group,
        )  # fmt: skip
    else:
        by_row = active.dentropy is not None or active.row_scale is not None
        options = by_row or head.has_options
        tile = tile_for("dlogits", active.states, head.weight, active.out_of, options=options)
        _launch(dz, active, head, tile)
    report("recompute", triton.cdiv(count, tile.block_r) * tile.block_r, vocab, depth)
    return dz


def _launch(dz: Tensor, active: Active, head: Head, tile: Tile) -> None:
    (count, vocab), depth = dz.shape, active.states.shape[1]
    hidden, weight = sources(tile, active.states, head.weight)
    _dlogits_kernel[(programs(tile, count, vocab, dz.device),)](
        dz, hidden, weight, head.bias, active.tokens, active.row_scale,
        active.lse, active.entropy, active.dlogp, active.dentropy, active.loss_scale,
        dz.stride(0) // COLUMNS, *active.states.stride(), *head.weight.stride(),
        head.start, count, vocab, depth, head.scale, head.softcap or 0.0,
        SOFTCAP=head.softcap is not None, DESCRIPTORS=tile.descriptors,
        DTYPE=TRITON_DTYPES[promoted(active.states, head.weight)],
        BLOCK_R=tile.block_r, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP=tile.group,
        FLATTEN=tile.persistent, **compiler_options(tile, dz.device),
    )  # fmt: skip
