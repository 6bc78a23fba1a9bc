"""The schedule that the warp-specialised kernels share: who waits for whom, and for what.

A program has a producer of one warp and two consumers of four. The producer copies blocks of hidden
states [128, BLOCK_D] and of weights [BLOCK_V, BLOCK_D] into a ring of STAGES slots. Each consumer
multiplies 64 of the 128 rows by the same weights: a block of weights is read from L2 once for both.
Nothing ties the consumers to each other but the ring. One gets ahead of the other, and from then on
the tensor cores multiply for one while the other reduces or stores its tile.

Each slot has two barriers. `full` takes one arrival and the bytes of three copies; `empty` takes an
arrival of each consumer, when the product that read the slot has ended. Step n uses slot
n mod STAGES, in phase n div STAGES of its barriers. Every role counts the steps by itself, over the
same turns.

Gluon has no interpreter: tests/linear_logprob/test_gluon_schedule.py runs this source on a
simulated multiprocessor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Rows of one consumer: one wgmma has 64.
HALF = gl.constexpr(64)
# Stands for a logit beyond the vocabulary: 2^(−1e30·s) is 0, and 0·(−1e30) too, unlike 0·(−∞).
NEVER = gl.constexpr(-1e30)
LOG2E = gl.constexpr(1.4426950408889634)
# Triton 3.8 gave it a new name, 3.9 took the old one away.
copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def tile_at(turn, row_tiles, vocab_tiles, GROUP: gl.constexpr):
    """Row tile and vocabulary tile of a turn: GROUP row tiles walk the vocabulary together."""
    group = turn // (GROUP * vocab_tiles)
    height = gl.minimum(row_tiles - group * GROUP, GROUP)
    inside = turn - group * GROUP * vocab_tiles
    return group * GROUP + inside % height, inside // height


@gluon.jit
def make_ring(hidden, weight, STAGES: gl.constexpr):
    """The slots in shared memory and their barriers: hidden, weight, full, empty."""
    # A slot is free one step after its product: a single one would wait for itself.
    gl.static_assert(STAGES >= 2)
    hidden_ring = gl.allocate_shared_memory(
        hidden.dtype, [STAGES * 2, hidden.block_shape[0], hidden.block_shape[1]], hidden.layout
    )
    weight_ring = gl.allocate_shared_memory(
        weight.dtype, [STAGES, weight.block_shape[0], weight.block_shape[1]], weight.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    # Copies complete `full` through the asynchronous proxy, which must find it initialised.
    fence_async_shared()
    return hidden_ring, weight_ring, full, empty


@gluon.jit
def producer(
    ring,
    hidden,  # descriptor of [R, D], blocks [HALF, BLOCK_D]
    weight,  # descriptor of [V, D], blocks [BLOCK_V, BLOCK_D]
    row_tiles,
    vocab_tiles,
    D,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Fills slot after slot, each as soon as both consumers have left it."""
    hidden_ring, weight_ring, full, empty = ring
    step = 0
    for turn in range(gl.program_id(0), row_tiles * vocab_tiles, gl.num_programs(0)):
        row_tile, vocab_tile = tile_at(turn, row_tiles, vocab_tiles, GROUP)
        row, col = row_tile * (2 * HALF), vocab_tile * BLOCK_V
        for depth in range(0, D, BLOCK_D):
            slot = step % STAGES
            # A new barrier passes as if phase 1 were complete: the first round need not wait.
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            arrived = full.index(slot)
            # The zeros that the copy engine puts beyond an edge count as bytes, too.
            mbarrier.expect(arrived, (2 * HALF + BLOCK_V) * BLOCK_D * 2)
            upper, lower = hidden_ring.index(slot * 2), hidden_ring.index(slot * 2 + 1)
            copy_block(hidden, [row, depth], arrived, upper)
            copy_block(hidden, [row + HALF, depth], arrived, lower)
            copy_block(weight, [col, depth], arrived, weight_ring.index(slot))
            step += 1


@gluon.jit
def multiply(
    half: gl.constexpr,
    ring,
    step,
    D,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """A consumer's tile hidden · weightᵀ [HALF, BLOCK_V] in fp32, and the next step.

    The last product still runs: `finish` waits for it.
    """
    hidden_ring, weight_ring, full, empty = ring
    gl.assume(D > 0)  # the compiler need not prepare for a loop that never runs
    tile = gl.zeros([HALF, BLOCK_V], gl.float32, layout)
    for depth in range(0, D, BLOCK_D):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        states, weights = hidden_ring.index(slot * 2 + half), weight_ring.index(slot)
        running = warpgroup_mma(states, weights.permute((1, 0)), tile, is_async=True)
        # This product runs on; the one before it has ended, and its slot is free.
        tile = warpgroup_mma_wait(num_outstanding=1, deps=(running,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=depth > 0)
        step += 1
    return tile, step


@gluon.jit
def finish(tile, ring, step, STAGES: gl.constexpr):
    """The tile of `multiply` when its last product has ended; the slot of that one is free."""
    empty = ring[3]
    tile = warpgroup_mma_wait(num_outstanding=0, deps=(tile,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return tile
