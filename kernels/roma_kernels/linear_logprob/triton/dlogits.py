"""Gradient by a tile of logits, in Triton: the product once more, and dz from its registers.

    dz = g·(1[v=y] − p) − e·p·(log p + H) ;  dz ← dz·(1 − (z/s)²)·(1/τ)        p = e^(z − lse)

The logits are recomputed by the code of the forward sweep, in fp32, and stay on chip: 2 bytes per
logit are written (bf16), and read twice by the vendor's two products.
Two runs are bitwise equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.linear_logprob.rows import Active, Head
from roma_kernels.linear_logprob.triton.configs import (
    TRITON_DTYPES,
    programs,
    promoted,
    sources,
    tile_for,
)
from roma_kernels.linear_logprob.triton.tile import _dz, _logits, _product, _tile_at
from roma_kernels.products import report


@triton.jit(do_not_specialize=["vocab_start", "A"])
def _dlogits_kernel(
    dz_ptr,  # [A, V], row stride stride_dz
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
    stride_dz,
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
        row_scale = scale
        if scale_ptr is not None:
            row_scale = tl.load(scale_ptr + rows, rows < A, other=1.0)[:, None]
        z = _logits(product, bias_ptr, cols, V, row_scale, softcap, SOFTCAP)

        log_p = z - tl.load(lse_ptr + rows, rows < A, other=0.0)[:, None]
        p = tl.exp(log_p)
        g = tl.load(dlogp_ptr + rows, rows < A, other=0.0)[:, None]
        slope = g
        if dentropy_ptr is not None:
            e = tl.load(dentropy_ptr + rows, rows < A, other=0.0)[:, None]
            entropy = tl.load(entropy_ptr + rows, rows < A, other=0.0)[:, None]
            # p = 0 where log p = −∞: a masked entry takes no part in the entropy.
            slope += e * (tl.where(p > 0, log_p, 0.0) + entropy)
        token = (tl.load(tokens_ptr + rows, rows < A, other=-1) - vocab_start)[:, None]
        dz = _dz(z, p, slope, cols, token, g, row_scale, softcap, SOFTCAP)
        if loss_scale_ptr is not None:
            dz *= tl.load(loss_scale_ptr)
        places = rows.to(tl.int64)[:, None] * stride_dz + cols[None, :]
        inside = (rows < A)[:, None] & (cols < V)[None, :]
        tl.store(dz_ptr + places, dz.to(dz_ptr.dtype.element_ty), inside)


def dlogits(active: Active, head: Head) -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries."""
    count, (vocab, depth) = len(active.states), head.weight.shape
    dz = active.states.new_empty(count, vocab)
    dtype = promoted(active.states, head.weight)
    extra = head.softcap is not None or active.dentropy is not None
    tile = tile_for(dz.device, dtype, count, softcap_or_entropy=extra)
    described, hidden, weight = sources(tile, active.states, head.weight)
    _dlogits_kernel[(programs(tile, count, vocab, dz.device),)](
        dz, hidden, weight, head.bias, active.tokens, active.row_scale,
        active.lse, active.entropy, active.dlogp, active.dentropy, active.loss_scale,
        dz.stride(0), *active.states.stride(), *head.weight.stride(),
        head.start, count, vocab, depth, head.scale, head.softcap or 0.0,
        SOFTCAP=head.softcap is not None, DESCRIPTORS=described, DTYPE=TRITON_DTYPES[dtype],
        BLOCK_R=tile.block_r, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP=tile.group,
        FLATTEN=tile.persistent, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    report("recompute", triton.cdiv(count, tile.block_r) * tile.block_r, vocab, depth)
    return dz
