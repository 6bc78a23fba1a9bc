"""Three kernels: the log-ratios of whole sequences, sums of each sequence, and their total.

fp32, sums in a fixed order, no atomics: two runs are bitwise equal. See ../triton_backend.py.
"""

import triton
import triton.language as tl

from roma_kernels.roma_loss.triton.terms import (
    _divergence,
    _gate,
    _objective,
    _reference_kl,
    _view_gaps,
    _worst,
)

# Where a tensor starts depends on the batch: rows of [K+1, M], or a part of a user's. A token is
# four bytes in each, and a kernel that knew of 16-byte addresses would be no faster.
ANYWHERE = (
    *("dlogp_ptr", "dview_ptr", "logp_ptr", "view_ptr", "old_ptr", "ref_ptr", "view_old_ptr"),
    *("advantages_ptr", "ends_ptr", "lengths_ptr", "aux_ptr", "correct_ptr"),
    "rollout_ptr",
)


@triton.jit(do_not_specialize=["stride_vk"], do_not_specialize_on_alignment=ANYWHERE)
def _ratios_kernel(
    levels_ptr,  # [B, LEVELS], of which 0 and 1 are written: clean image, sampled view
    logp_ptr,  # [M]
    view_ptr,  # [K, M]
    old_ptr,  # [M]
    view_old_ptr,  # [M]
    rollout_ptr,  # [M] or None
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    aux_ptr,  # [B] int64 or None
    stride_n,
    stride_vk,
    stride_vn,
    clamp,
    lowest,  # of vespo's log-weights
    highest,
    LEVEL: tl.constexpr,  # "mean", or "sum" of clamped ones and the sampler's
    BLOCK_T: tl.constexpr,
    LEVELS: tl.constexpr,
):
    i = tl.program_id(0)
    length = tl.load(lengths_ptr + i)
    start = tl.load(ends_ptr + i) - length
    of_clean = 0.0
    of_view = 0.0
    of_sampler = 0.0
    for first in range(0, length, BLOCK_T):
        inside = first + tl.arange(0, BLOCK_T) < length
        token = start + first + tl.arange(0, BLOCK_T)
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        gap = clean - tl.load(old_ptr + token, inside, other=0.0)
        if LEVEL == "sum":
            gap = tl.minimum(tl.maximum(gap, -clamp), clamp)
            if rollout_ptr is not None:
                rollout = tl.load(rollout_ptr + token, inside, other=1.0)
                log_weight = tl.log(tl.maximum(rollout, 1e-30))  # below e^lowest
                of_sampler += tl.sum(tl.minimum(tl.maximum(log_weight, lowest), highest))
        of_clean += tl.sum(gap)
        if aux_ptr is not None:
            sampled = view_ptr + tl.load(aux_ptr + i) * stride_vk + token * stride_vn
            gap = tl.load(sampled, inside, other=0.0)
            gap -= tl.load(view_old_ptr + token, inside, other=0.0)
            if LEVEL == "sum":
                gap = tl.minimum(tl.maximum(gap, -clamp), clamp)
            of_view += tl.sum(gap)
    if LEVEL == "sum":
        of_clean = tl.minimum(tl.maximum(of_clean + of_sampler, lowest), highest)
        of_view = tl.minimum(tl.maximum(of_view + of_sampler, lowest), highest)
    else:
        of_clean /= tl.maximum(length, 1).to(tl.float32)
        of_view /= tl.maximum(length, 1).to(tl.float32)
    tl.store(levels_ptr + i * LEVELS, of_clean)
    tl.store(levels_ptr + i * LEVELS + 1, of_view)


@triton.jit
def _store_sums(ptr, B, policy, above, below, moved, reference, auxiliary, aux_clipped):
    """Writes a sequence's sums of terms, each to its row of [_SUMS, B]."""
    tl.store(ptr + 0 * B, policy)
    tl.store(ptr + 1 * B, above)
    tl.store(ptr + 2 * B, below)
    tl.store(ptr + 3 * B, moved)
    tl.store(ptr + 4 * B, reference)
    tl.store(ptr + 5 * B, auxiliary)
    tl.store(ptr + 6 * B, aux_clipped)


@triton.jit(do_not_specialize=["stride_vk", "B"], do_not_specialize_on_alignment=ANYWHERE)
def _sums_kernel(
    sums_ptr,  # [_SUMS, B]
    divergence_ptr,  # [K, B]
    worst_ptr,  # [B], or [M] if WORST_OVER is "token"
    levels_ptr,  # [B, LEVELS]: 0, 1 are read if LEVEL is not "token"; 2 to 4 are written
    logp_ptr,  # [M]
    view_ptr,  # [K, M]
    old_ptr,  # [M]
    ref_ptr,  # [M] or None
    view_old_ptr,  # [M]
    advantages_ptr,  # [M]
    rollout_ptr,  # [M] or None
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    aux_ptr,  # [B] int64 or None
    bound_ptr,  # 0-dim, or None: no gate
    stride_n,
    stride_vk,
    stride_vn,
    B,
    K,
    shape_0,
    shape_1,
    shape_2,
    shape_3,
    clamp,
    ref_coef,
    gate_rate,  # 1/τ
    OBJECTIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    UNBIASED: tl.constexpr,
    VIEW_OVER_CLEAN: tl.constexpr,
    WORST_OVER: tl.constexpr,
    MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LEVELS: tl.constexpr,
):
    i = tl.program_id(0)
    length = tl.load(lengths_ptr + i)
    start = tl.load(ends_ptr + i) - length
    k = tl.arange(0, BLOCK_K)
    level = tl.load(levels_ptr + i * LEVELS)
    aux_level = tl.load(levels_ptr + i * LEVELS + 1)
    divergence = tl.zeros((BLOCK_K,), tl.float32)
    shared = 0.0
    aux_shared = 0.0
    highest = 0.0
    policy = 0.0
    above = 0.0
    below = 0.0
    moved = 0.0
    reference = 0.0
    auxiliary = 0.0
    aux_clipped = 0.0
    for first in range(0, length, BLOCK_T):
        inside = first + tl.arange(0, BLOCK_T) < length
        token = start + first + tl.arange(0, BLOCK_T)
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        old = tl.load(old_ptr + token, inside, other=0.0)
        advantages = tl.load(advantages_ptr + token, inside, other=0.0)
        rollout = 1.0
        if rollout_ptr is not None:
            rollout = tl.load(rollout_ptr + token, inside, other=0.0)
        moved += tl.sum(old - clean)
        if MAIN:
            loss, _, slope, over, under = _objective(
                clean, old, advantages, rollout, level, shape_0, shape_1, shape_2, shape_3, clamp,
                OBJECTIVE, LEVEL,
            )  # fmt: skip
            policy += tl.sum(loss)
            above += tl.sum(over.to(tl.float32))
            below += tl.sum(under.to(tl.float32))
            shared += tl.sum(slope)
            if ref_ptr is not None:
                ref = tl.load(ref_ptr + token, inside, other=0.0)
                d, _, slope = _reference_kl(ref, clean, old, level, clamp, LEVEL, UNBIASED)
                reference += tl.sum(d)
                shared += ref_coef * tl.sum(slope)
        if aux_ptr is not None:
            sampled = view_ptr + tl.load(aux_ptr + i) * stride_vk + token * stride_vn
            view = tl.load(sampled, inside, other=0.0)
            view_old = tl.load(view_old_ptr + token, inside, other=0.0)
            loss, _, slope, over, under = _objective(
                view, view_old, advantages, rollout, aux_level, shape_0, shape_1, shape_2, shape_3,
                clamp, OBJECTIVE, LEVEL,
            )  # fmt: skip
            auxiliary += tl.sum(loss)
            aux_clipped += tl.sum((over | under).to(tl.float32))
            aux_shared += tl.sum(slope)
        if divergence_ptr is not None:
            gap = _view_gaps(
                view_ptr, clean, token, inside, K, stride_vk, stride_vn, VIEW_OVER_CLEAN, BLOCK_K
            )
            d, _ = _divergence(gap, clamp)
            divergence += tl.sum(d, 1)
            highest += tl.sum(tl.max(d, 0))
            if WORST_OVER == "token":
                worst = tl.argmax(tl.where((k < K)[:, None], d, -1.0), 0)
                tl.store(worst_ptr + token, worst.to(tl.int64), inside)
    _store_sums(sums_ptr + i, B, policy, above, below, moved, reference, auxiliary, aux_clipped)
    count = tl.maximum(length, 1).to(tl.float32)
    tl.store(levels_ptr + i * LEVELS + 2, shared / count)
    tl.store(levels_ptr + i * LEVELS + 3, aux_shared / count)
    if divergence_ptr is not None:
        divergence /= count
        mean = tl.sum(divergence) / K
        divergence = tl.where(k < K, divergence, -1.0)
        tl.store(divergence_ptr + k * B + i, divergence, k < K)
        penalty, worst = _worst(divergence, highest / count, mean, WORST_OVER)
        if bound_ptr is not None:
            penalty, worst, share, gated = _gate(divergence, tl.load(bound_ptr), gate_rate)
            tl.store(levels_ptr + i * LEVELS + 4, share)
            tl.store(sums_ptr + 9 * B + i, gated)
        if WORST_OVER == "sequence" or WORST_OVER == "mean":
            tl.store(worst_ptr + i, worst.to(tl.int64))
        tl.store(sums_ptr + 7 * B + i, penalty)
        tl.store(sums_ptr + 8 * B + i, mean)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=ANYWHERE)
def _total_kernel(
    metrics_ptr,  # [len(METRICS)], in its order; 10, the entropy, is added later
    worst_ptr,  # 0-dim if WORST_OVER is "batch"
    sums_ptr,  # [_SUMS, B]
    divergence_ptr,  # [K, B] or None
    correct_ptr,  # [B] bool
    token_divisors_ptr,  # [B]: divisor of a sequence's token losses
    penalty_divisor_ptr,  # 0-dim
    total_sequences_ptr,  # 0-dim
    total_tokens_ptr,  # 0-dim
    lambda_inv_ptr,  # 0-dim
    lambda_aux_ptr,  # 0-dim
    B,
    K,
    ref_coef,
    WORST_OVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    sequences = tl.maximum(tl.load(total_sequences_ptr), 1.0)
    tokens = tl.maximum(tl.load(total_tokens_ptr), 1.0)
    k = tl.arange(0, BLOCK_K)
    of_views = tl.zeros((BLOCK_K,), tl.float32)
    policy = 0.0
    above = 0.0
    below = 0.0
    moved = 0.0
    reference = 0.0
    auxiliary = 0.0
    aux_clipped = 0.0
    penalty = 0.0
    mean = 0.0
    gated = 0.0
    for first in range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        inside = i < B
        divisor = tl.load(token_divisors_ptr + i, inside, other=1.0)
        policy += tl.sum(tl.load(sums_ptr + 0 * B + i, inside, other=0.0) / divisor)
        above += tl.sum(tl.load(sums_ptr + 1 * B + i, inside, other=0.0))
        below += tl.sum(tl.load(sums_ptr + 2 * B + i, inside, other=0.0))
        moved += tl.sum(tl.load(sums_ptr + 3 * B + i, inside, other=0.0))
        reference += tl.sum(tl.load(sums_ptr + 4 * B + i, inside, other=0.0) / divisor)
        auxiliary += tl.sum(tl.load(sums_ptr + 5 * B + i, inside, other=0.0) / divisor)
        aux_clipped += tl.sum(tl.load(sums_ptr + 6 * B + i, inside, other=0.0))
        if divergence_ptr is not None:
            right = tl.load(correct_ptr + i, inside, other=0).to(tl.float32)
            penalty += tl.sum(tl.load(sums_ptr + 7 * B + i, inside, other=0.0) * right)
            mean += tl.sum(tl.load(sums_ptr + 8 * B + i, inside, other=0.0) * right)
            gated += tl.sum(tl.load(sums_ptr + 9 * B + i, inside, other=0.0) * right)
            if WORST_OVER == "batch":
                places = k[:, None] * B + i[None, :]
                both = (k < K)[:, None] & inside[None, :]
                divergence = tl.load(divergence_ptr + places, both, other=0.0)
                of_views += tl.sum(divergence * right[None, :], 1)
    if WORST_OVER == "batch" and divergence_ptr is not None:
        of_views = tl.where(k < K, of_views, -1.0)
        penalty = tl.max(of_views)
        tl.store(worst_ptr, tl.argmax(of_views, 0).to(tl.int64))
    penalty /= tl.load(penalty_divisor_ptr)
    loss = policy + ref_coef * reference
    loss += tl.load(lambda_aux_ptr) * auxiliary + tl.load(lambda_inv_ptr) * penalty
    tl.store(metrics_ptr + 0, loss)
    tl.store(metrics_ptr + 1, policy)
    tl.store(metrics_ptr + 2, above / tokens)
    tl.store(metrics_ptr + 3, below / tokens)
    tl.store(metrics_ptr + 4, moved / tokens)
    tl.store(metrics_ptr + 5, reference)
    tl.store(metrics_ptr + 6, penalty)
    tl.store(metrics_ptr + 7, mean / sequences)
    tl.store(metrics_ptr + 8, auxiliary)
    tl.store(metrics_ptr + 9, aux_clipped / tokens)
    if divergence_ptr is not None:
        tl.store(metrics_ptr + 11, gated / (sequences * K))
