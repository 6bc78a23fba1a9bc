"""Four kernels: sums of each sequence, their total, coefficients of the clean image, of the views.

fp32, sums in a fixed order, no atomics: two runs are bitwise equal. See ../triton_backend.py.
"""

import triton
import triton.language as tl

from roma_kernels.roma_loss.triton.terms import _clipped_objective, _divergence, _view_gaps

# Where a tensor starts depends on the batch: rows of [K+1, M], or a part of a user's. A token is
# four bytes in each, and a kernel that knew of 16-byte addresses would be no faster.
_ANYWHERE = (
    *("dlogp_ptr", "dview_ptr", "logp_ptr", "view_ptr", "old_ptr", "ref_ptr", "view_old_ptr"),
    *("advantages_ptr", "ends_ptr", "lengths_ptr", "aux_ptr", "correct_ptr"),
)


@triton.jit(do_not_specialize=["stride_vk", "B"], do_not_specialize_on_alignment=_ANYWHERE)
def _sums_kernel(
    sums_ptr,  # [_SUMS, B]
    divergence_ptr,  # [K, B]
    worst_ptr,  # [B], or [M] if WORST_OVER is "token"
    logp_ptr,  # [M]
    view_ptr,  # [K, M]
    old_ptr,  # [M]
    ref_ptr,  # [M] or None
    view_old_ptr,  # [M]
    advantages_ptr,  # [M]
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    aux_ptr,  # [B] int64 or None
    stride_n,
    stride_vk,
    stride_vn,
    B,
    K,
    low,
    high,
    dual,
    clamp,
    VIEW_OVER_CLEAN: tl.constexpr,
    WORST_OVER: tl.constexpr,
    MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0)
    length = tl.load(lengths_ptr + i)
    start = tl.load(ends_ptr + i) - length
    k = tl.arange(0, BLOCK_K)
    divergence = tl.zeros((BLOCK_K,), tl.float32)
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
        moved += tl.sum(old - clean)
        if MAIN:
            loss, _, over, under = _clipped_objective(
                clean, old, advantages, low, high, dual, clamp
            )
            policy += tl.sum(loss)
            above += tl.sum(over.to(tl.float32))
            below += tl.sum(under.to(tl.float32))
            if ref_ptr is not None:
                d, _ = _divergence(tl.load(ref_ptr + token, inside, other=0.0) - clean, clamp)
                reference += tl.sum(d)
        if aux_ptr is not None:
            sampled = view_ptr + tl.load(aux_ptr + i) * stride_vk + token * stride_vn
            view_old = tl.load(view_old_ptr + token, inside, other=0.0)
            loss, _, over, under = _clipped_objective(
                tl.load(sampled, inside, other=0.0), view_old, advantages, low, high, dual, clamp
            )
            auxiliary += tl.sum(loss)
            aux_clipped += tl.sum((over | under).to(tl.float32))
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
    tl.store(sums_ptr + 0 * B + i, policy)
    tl.store(sums_ptr + 1 * B + i, above)
    tl.store(sums_ptr + 2 * B + i, below)
    tl.store(sums_ptr + 3 * B + i, moved)
    tl.store(sums_ptr + 4 * B + i, reference)
    tl.store(sums_ptr + 5 * B + i, auxiliary)
    tl.store(sums_ptr + 6 * B + i, aux_clipped)
    if divergence_ptr is not None:
        count = tl.maximum(length, 1).to(tl.float32)
        divergence /= count
        mean = tl.sum(divergence) / K
        divergence = tl.where(k < K, divergence, -1.0)
        tl.store(divergence_ptr + k * B + i, divergence, k < K)
        penalty = tl.max(divergence)
        if WORST_OVER == "token":
            penalty = highest / count
        elif WORST_OVER == "mean":
            penalty = mean
        if WORST_OVER == "sequence" or WORST_OVER == "mean":
            tl.store(worst_ptr + i, tl.argmax(divergence, 0).to(tl.int64))
        tl.store(sums_ptr + 7 * B + i, penalty)
        tl.store(sums_ptr + 8 * B + i, mean)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=_ANYWHERE)
def _total_kernel(
    metrics_ptr,  # [len(METRICS)], in its order
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


@triton.jit(
    do_not_specialize=["first_token", "last_token"], do_not_specialize_on_alignment=_ANYWHERE
)
def _clean_coefficients_kernel(
    dlogp_ptr,  # [M], zeros
    weights_ptr,  # [B]: of each token loss of a sequence
    logp_ptr,  # [M]
    old_ptr,  # [M]
    ref_ptr,  # [M] or None
    advantages_ptr,  # [M]
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    stride_n,
    first_token,  # only tokens in [first_token, last_token)
    last_token,
    low,
    high,
    dual,
    clamp,
    ref_coef,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0)
    end = tl.load(ends_ptr + i)
    start = end - tl.load(lengths_ptr + i)
    weight = tl.load(weights_ptr + i)
    last = tl.minimum(end, last_token)
    for first in range(tl.maximum(start, first_token), last, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        inside = token < last
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        old = tl.load(old_ptr + token, inside, other=0.0)
        advantages = tl.load(advantages_ptr + token, inside, other=0.0)
        _, slope, _, _ = _clipped_objective(clean, old, advantages, low, high, dual, clamp)
        if ref_ptr is not None:
            gap = tl.load(ref_ptr + token, inside, other=0.0) - clean
            slope -= ref_coef * _divergence(gap, clamp)[1]
        tl.store(dlogp_ptr + token, slope * weight, inside)


@triton.jit(
    do_not_specialize=["stride_vk", "M", "first_token", "last_token"],
    do_not_specialize_on_alignment=_ANYWHERE,
)
def _view_coefficients_kernel(
    dview_ptr,  # [K, M], zeros
    worst_ptr,  # [B] for WORST_OVER "sequence", 0-dim for "batch"
    penalty_weights_ptr,  # [B]: of each token's divergence, 0 for a wrong rollout
    aux_weights_ptr,  # [B]: of each token's auxiliary loss
    logp_ptr,  # [M]
    view_ptr,  # [K, M]
    view_old_ptr,  # [M]
    advantages_ptr,  # [M]
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    aux_ptr,  # [B] int64 or None
    stride_n,
    stride_vk,
    stride_vn,
    M,
    K,
    first_token,  # only tokens in [first_token, last_token)
    last_token,
    low,
    high,
    dual,
    clamp,
    VIEW_OVER_CLEAN: tl.constexpr,
    WORST_OVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0)
    end = tl.load(ends_ptr + i)
    start = end - tl.load(lengths_ptr + i)
    weight = tl.load(penalty_weights_ptr + i)
    k = tl.arange(0, BLOCK_K)
    last = tl.minimum(end, last_token)
    for first in range(tl.maximum(start, first_token), last, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        inside = token < last
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        gap = _view_gaps(
            view_ptr, clean, token, inside, K, stride_vk, stride_vn, VIEW_OVER_CLEAN, BLOCK_K
        )
        d, slopes = _divergence(gap, clamp)
        if not VIEW_OVER_CLEAN:
            slopes = -slopes
        if WORST_OVER == "mean":
            slopes /= K
        else:
            if WORST_OVER == "token":
                worst = tl.argmax(tl.where((k < K)[:, None], d, -1.0), 0)[None, :]
            elif WORST_OVER == "sequence":
                worst = tl.load(worst_ptr + i)
            else:
                worst = tl.load(worst_ptr)
            slopes = tl.where(k[:, None] == worst, slopes, 0.0)
        slopes *= weight
        if aux_ptr is not None:
            sampled = tl.load(aux_ptr + i)
            aux = view_ptr + sampled * stride_vk + token * stride_vn
            view_old = tl.load(view_old_ptr + token, inside, other=0.0)
            advantages = tl.load(advantages_ptr + token, inside, other=0.0)
            _, slope, _, _ = _clipped_objective(
                tl.load(aux, inside, other=0.0), view_old, advantages, low, high, dual, clamp
            )
            slope *= tl.load(aux_weights_ptr + i)
            slopes += tl.where(k[:, None] == sampled, slope[None, :], 0.0)
        places = k.to(tl.int64)[:, None] * M + token[None, :]
        tl.store(dview_ptr + places, slopes, (k < K)[:, None] & inside[None, :])
