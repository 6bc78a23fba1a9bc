"""Gradient by a tile of logits on sm_90: the product once more, and dz from its registers.

    dz = p·(a + b·z) + g·1[v=y]        p = 2^((z − τ·lse)·log₂e/τ), z the product

With g = dlogp/τ and e = dentropy/τ, a row's factors are b = −e/τ and a = −g − e·(H − lse), which is
triton/dlogits.py's g·(1[v=y] − p) − e·p·(log p + H). `launch.py` forms them. 2 bytes per logit are
written. Two runs are bitwise equal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from roma_kernels.linear_logprob.gluon.schedule import (
    HALF,
    NEVER,
    finish,
    make_ring,
    multiply,
    producer,
    tile_at,
)


@gluon.jit
def _with_entropy(z, scale2, lse, slope, slope_z):
    return gl.exp2((z - lse) * scale2) * gl.fma(z, slope_z, slope)


@gluon.jit
def _consumer(
    half: gl.constexpr,
    ring,
    dz_ptr,
    factors,
    sizes,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    tokens_ptr, scale2_ptr, lse_ptr, g_ptr, slope_ptr, slope_z_ptr = factors
    stride_dz64, vocab_start, A, V, D = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    cols = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, layout))
    row_tiles, vocab_tiles = gl.cdiv(A, 2 * HALF), gl.cdiv(V, BLOCK_V)
    step = 0
    for turn in range(gl.program_id(0), row_tiles * vocab_tiles, gl.num_programs(0)):
        row_tile, vocab_tile = tile_at(turn, row_tiles, vocab_tiles, GROUP)
        col = vocab_tile * BLOCK_V
        rows = row_tile * (2 * HALF) + half * HALF
        rows += gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        inside = rows < A
        token = gl.load(tokens_ptr + rows, inside, other=-1)
        scale2 = gl.load(scale2_ptr + rows, inside, other=0.0)[:, None]
        lse = gl.load(lse_ptr + rows, inside, other=0.0)[:, None]
        slope = gl.load(slope_ptr + rows, inside, other=0.0)[:, None]
        if slope_z_ptr is not None:
            slope_z = gl.load(slope_z_ptr + rows, inside, other=0.0)[:, None]

        running, step = multiply(half, ring, step, D, BLOCK_V, BLOCK_D, STAGES, layout)
        local = gl.cast(token - vocab_start, gl.int32) - col
        # A token of the next slice of the vocabulary may lie in the last tile, beyond its end.
        here = inside & (local >= 0) & (local < gl.minimum(BLOCK_V, V - col))
        found = gl.max(gl.where(here, 1, 0), 0)
        z = finish(running, ring, step, STAGES)

        if col + BLOCK_V > V:
            z = gl.where((cols < V - col)[None, :], z, NEVER)
        if slope_z_ptr is not None:
            # Entry by entry: step by step over the tile it would need 256 registers.
            dz = gl.map_elementwise(_with_entropy, z, scale2, lse, slope, slope_z)
        else:
            dz = gl.exp2((z - lse) * scale2) * slope
        if found > 0:
            g = gl.load(g_ptr + rows, inside, other=0.0)[:, None]
            target = cols[None, :] == gl.where(here, local, -1)[:, None]
            dz = gl.where(target, dz + g, dz)
        width = stride_dz64 * 64
        places = gl.cast(rows, gl.int64)[:, None] * width + (col + cols)[None, :]
        stored = inside[:, None] & (col + cols < gl.cdiv(V, 64) * 64)[None, :]
        gl.store(dz_ptr + places, gl.cast(dz, dz_ptr.dtype.element_ty), stored)


@gluon.jit(
    do_not_specialize=["stride_dz64", "vocab_start", "A", "V", "D"],
    do_not_specialize_on_alignment=["tokens_ptr"],
)
def _gluon_dlogits_kernel(
    dz_ptr,  # [A, 64·stride_dz64]: V columns, and zeros up to a multiple of 64
    hidden,  # descriptor of [A, D]
    weight,  # descriptor of [V, D]
    tokens_ptr,  # [A] int64
    scale2_ptr,  # [A], log₂e/τ
    lse_ptr,  # [A], τ·lse
    g_ptr,  # [A]
    slope_ptr,  # [A], a
    slope_z_ptr,  # [A], b, or None without entropy
    stride_dz64,
    vocab_start,
    A,
    V,
    D,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    gl.static_assert(BLOCK_V % 64 == 0)  # so that the last tile has the zeros behind V
    row_tiles, vocab_tiles = gl.cdiv(A, 2 * HALF), gl.cdiv(V, BLOCK_V)
    ring = make_ring(hidden, weight, STAGES)
    factors = (tokens_ptr, scale2_ptr, lse_ptr, g_ptr, slope_ptr, slope_z_ptr)
    sizes = (stride_dz64, vocab_start, A, V, D)
    gl.warp_specialize(
        [
            (_consumer, (0, ring, dz_ptr, factors, sizes, BLOCK_V, BLOCK_D, STAGES, GROUP)),
            (_consumer, (1, ring, dz_ptr, factors, sizes, BLOCK_V, BLOCK_D, STAGES, GROUP)),
            (
                producer,
                (ring, hidden, weight, row_tiles, vocab_tiles, D, BLOCK_V, BLOCK_D, STAGES, GROUP),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
