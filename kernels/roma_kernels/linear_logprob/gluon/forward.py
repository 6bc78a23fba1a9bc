"""Forward sweep over the vocabulary on sm_90: peak, total, moment and target of each row.

As `triton/forward.py` has it, by the schedule of `schedule.py`:

    peak = max_v z_v/τ ; total = Σ_v e^(z_v/τ − peak) ; moment = Σ_v e^(z_v/τ − peak)·z_v/τ

A consumer's tile [64, BLOCK_V] of products exists in fp32 registers only. What its rows need is
loaded before the products; whether it holds a target is found while the last product runs. Columns
beyond the vocabulary are masked in the last tile only, and targets looked for only where one is.
No atomics: two runs are bitwise equal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from roma_kernels.linear_logprob.gluon.schedule import (
    HALF,
    LOG2E,
    NEVER,
    finish,
    make_ring,
    multiply,
    producer,
    tile_at,
)


@gluon.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@gluon.jit
def _consumer(
    half: gl.constexpr,
    ring,
    sums,
    inputs,
    sizes,
    scale,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    peak_ptr, total_ptr, moment_ptr, target_ptr = sums
    tokens_ptr, scale_ptr = inputs
    first, per_token, vocab_start, count, R, V, D = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16]
    )
    cols = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, layout))
    row_tiles, vocab_tiles = gl.cdiv(count, 2 * HALF), gl.cdiv(V, BLOCK_V)
    step = 0
    for turn in range(gl.program_id(0), row_tiles * vocab_tiles, gl.num_programs(0)):
        row_tile, vocab_tile = tile_at(turn, row_tiles, vocab_tiles, GROUP)
        col = vocab_tile * BLOCK_V
        rows = row_tile * (2 * HALF) + half * HALF
        rows += gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
        inside = rows < count
        token_of = (first + rows) // per_token
        token = gl.load(tokens_ptr + token_of, inside, other=-1)
        row_scale = gl.full([HALF], scale, gl.float32, gl.SliceLayout(1, layout))
        if scale_ptr is not None:
            row_scale = gl.load(scale_ptr + token_of, inside, other=1.0)

        running, step = multiply(half, ring, step, D, BLOCK_V, BLOCK_D, STAGES, layout)
        local = gl.cast(token - vocab_start, gl.int32) - col
        here = inside & (local >= 0) & (local < gl.minimum(BLOCK_V, V - col))
        found = gl.max(gl.where(here, 1, 0), 0)
        z = finish(running, ring, step, STAGES)

        if col + BLOCK_V > V:
            z = gl.where((cols < V - col)[None, :], z, NEVER)
        if found > 0:
            spots = (target_ptr + rows)[:, None] + gl.zeros([HALF, BLOCK_V], gl.int32, layout)
            target = cols[None, :] == gl.where(here, local, -1)[:, None]
            gl.store(spots, z * row_scale[:, None], target)
        highest = gl.max(z, 1)
        weights = gl.exp2((z - highest[:, None]) * (row_scale * LOG2E)[:, None])
        places = gl.cast(vocab_tile, gl.int64) * R + rows
        gl.store(peak_ptr + places, highest * row_scale, inside)
        if moment_ptr is not None:
            # Both at once: one after the other would need 256 registers for weights and products.
            total, moment = gl.reduce((weights, weights * z), 1, _add_pairs)
            gl.store(moment_ptr + places, moment * row_scale, inside)
        else:
            total = gl.sum(weights, 1)
        gl.store(total_ptr + places, total, inside)


@gluon.jit(
    do_not_specialize=["first", "per_token", "vocab_start", "R", "V", "D"],
    do_not_specialize_on_alignment=["peak_ptr", "total_ptr", "moment_ptr", "target_ptr"],
)
def _gluon_fwd_kernel(
    peak_ptr,  # [⌈V/BLOCK_V⌉, R]
    total_ptr,  # the same
    moment_ptr,  # the same, or None without entropy
    target_ptr,  # [R], zeros
    hidden,  # descriptor of [R, D]
    weight,  # descriptor of [V, D]
    tokens_ptr,  # int64, one per token
    scale_ptr,  # 1/τ, one per token, or None
    num_tokens_ptr,  # 0-dim int64 or None: how many tokens are computed
    first,  # the first row's number among all rows
    per_token,  # rows per token, K+1
    vocab_start,  # the first weight row's number among all tokens
    R,
    V,
    D,
    scale,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    count = R
    if num_tokens_ptr is not None:
        count = gl.minimum(R, gl.maximum(gl.load(num_tokens_ptr) * per_token - first, 0))
        count = gl.cast(count, gl.int32)
    row_tiles, vocab_tiles = gl.cdiv(count, 2 * HALF), gl.cdiv(V, BLOCK_V)
    ring = make_ring(hidden, weight, STAGES)
    sums = (peak_ptr, total_ptr, moment_ptr, target_ptr)
    inputs = (tokens_ptr, scale_ptr)
    sizes = (first, per_token, vocab_start, count, R, V, D)
    gl.warp_specialize(
        [
            (_consumer, (0, ring, sums, inputs, sizes, scale, BLOCK_V, BLOCK_D, STAGES, GROUP)),
            (_consumer, (1, ring, sums, inputs, sizes, scale, BLOCK_V, BLOCK_D, STAGES, GROUP)),
            (
                producer,
                (ring, hidden, weight, row_tiles, vocab_tiles, D, BLOCK_V, BLOCK_D, STAGES, GROUP),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
