"""A token's terms of the loss as Triton functions: k3, the clean objectives, the views' gaps.

docs/MATH.md section 3 has the formulas, and ../torch_backend.py the same in PyTorch. `gap` is the
log of the ratio, before its clamp.
"""

import triton
import triton.language as tl


@triton.jit
def _k3(delta):
    """k3 = expm1(δ) − δ to full relative precision, never negative; see torch_backend.py."""
    s = delta * (1 / 3628800) + 1 / 362880
    s = s * delta + 1 / 40320
    s = s * delta + 1 / 5040
    s = s * delta + 1 / 720
    s = s * delta + 1 / 120
    s = s * delta + 1 / 24
    s = s * delta + 1 / 6
    s = s * delta + 0.5
    return tl.where(tl.abs(delta) < 0.75, delta * delta * s, tl.exp(delta) - 1 - delta)


@triton.jit
def _divergence(gap, clamp):
    """k3 of a log-ratio and its slope by it, which is 0 beyond the clamp."""
    delta = tl.minimum(tl.maximum(gap, -clamp), clamp)
    d = _k3(delta)
    return d, tl.where(tl.abs(gap) > clamp, 0.0, delta + d)


@triton.jit
def _ratio(gap, clamp):
    """ρ, and where its clamp leaves no gradient."""
    return tl.exp(tl.minimum(tl.maximum(gap, -clamp), clamp)), tl.abs(gap) > clamp


@triton.jit
def _grpo(gap, advantages, low, high, dual, clamp):
    """Loss of each token, its slope by the gap, and whether it is clipped above and below."""
    ratio, flat = _ratio(gap, clamp)
    free = ratio * advantages
    clipped = tl.minimum(tl.maximum(ratio, low), high) * advantages
    clips = free > clipped
    loss = -tl.where(clips, clipped, free)
    ceiling = tl.where(advantages < 0, -dual * advantages, float("inf"))
    slope = tl.where(clips | (loss > ceiling) | flat, 0.0, -free)
    return tl.minimum(loss, ceiling), slope, clips & (advantages > 0), clips & (advantages < 0)


@triton.jit
def _cispo(logp, gap, advantages, cap, clamp):
    """The same, with a slope by logp; nothing is clipped below."""
    ratio, _ = _ratio(gap, clamp)
    slope = -tl.minimum(ratio, cap) * advantages
    above = (ratio > cap) & (advantages > 0)
    return slope * logp, slope, above, above & (advantages < 0)


@triton.jit
def _sapo(gap, advantages, of_positive, of_others, clamp):
    """The same, with a slope by the gap; nothing is clipped."""
    ratio, flat = _ratio(gap, clamp)
    kappa = tl.where(advantages > 0, of_positive, of_others)
    z = kappa * (ratio - 1)
    small = tl.exp(-tl.abs(z))  # σ and σ(1 − σ) of it, without an overflow or a difference
    whole = 1 / (1 + small)
    loss = -4 / kappa * tl.where(z < 0, small, 1.0) * whole * advantages
    slope = tl.where(flat, 0.0, -4 * small * whole * whole * ratio * advantages)
    none = flat & (ratio < 0)
    return loss, slope, none, none


@triton.jit
def _vespo(logp, log_w, advantages, k_high, rate_high, k_low, rate_low):
    """The same, with a slope by logp; nothing is clipped."""
    high = advantages >= 0
    k = tl.where(high, k_high, k_low)
    rate = tl.where(high, rate_high, rate_low)
    slope = -tl.exp(rate + k * log_w - rate * tl.exp(log_w)) * advantages
    none = high & (advantages < 0)
    return slope * logp, slope, none, none


@triton.jit
def _objective(
    logp, old, advantages, rollout, level, shape_0, shape_1, shape_2, shape_3, clamp,
    OBJECTIVE: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """Loss; its slope by logp, of the token's own and what all tokens share; clipped above, below.

    Args: rollout: the sampler's weight; level: log of the sequence's ratio, if LEVEL is not
    "token"; shapes: numbers of the objective, in the order of its function.
    """
    if LEVEL == "token":
        gap = logp - old
    else:
        gap = tl.zeros_like(logp) + level
    if OBJECTIVE == "grpo":
        loss, slope, above, below = _grpo(gap, advantages, shape_0, shape_1, shape_2, clamp)
    elif OBJECTIVE == "cispo":
        loss, slope, above, below = _cispo(logp, gap, advantages, shape_0, clamp)
    elif OBJECTIVE == "sapo":
        loss, slope, above, below = _sapo(gap, advantages, shape_0, shape_1, clamp)
    else:
        loss, slope, above, below = _vespo(
            logp, gap, advantages, shape_0, shape_1, shape_2, shape_3
        )
    if OBJECTIVE != "vespo":  # which has it in its level
        loss *= rollout
        slope *= rollout
    shared = tl.zeros_like(slope)
    if LEVEL == "mean" and OBJECTIVE != "cispo":
        shared = slope
        slope = tl.zeros_like(slope)
    return loss, slope, shared, above, below


@triton.jit
def _reference_kl(
    ref, logp, old, level, clamp, LEVEL: tl.constexpr, UNBIASED: tl.constexpr
):  # fmt: skip
    """KL to the reference, its slope by logp, and what all tokens share of that."""
    d, slope = _divergence(ref - logp, clamp)
    shared = tl.zeros_like(d)
    slope = -slope
    if UNBIASED:
        if LEVEL == "mean":
            gap = tl.zeros_like(logp) + level
        else:
            gap = logp - old
        ratio, flat = _ratio(gap, clamp)
        d *= ratio
        slope *= ratio
        by_ratio = tl.where(flat, 0.0, d)
        if LEVEL == "mean":
            shared = by_ratio
        else:
            slope += by_ratio
    return d, slope, shared


@triton.jit
def _worst(divergence, highest, mean, WORST_OVER: tl.constexpr):
    """A sequence's penalty and worst view, without a gate; highest: the mean of tokens' maxima."""
    penalty = tl.max(divergence)
    if WORST_OVER == "token":
        penalty = highest
    elif WORST_OVER == "mean":
        penalty = mean
    return penalty, tl.argmax(divergence, 0)


@triton.jit
def _gate(divergence, bound, rate):
    """A sequence's penalty, worst view (−1: none is left), weight, and how many views are out.

    Args: divergence [BLOCK_K], −1 where there is no view; rate: 1/τ.
    """
    out = divergence > bound
    left = tl.where(out, -1.0, divergence)
    highest = tl.max(left)
    worst = tl.where(highest < 0, -1, tl.argmax(left, 0))
    highest = tl.maximum(highest, 0.0)
    share = tl.exp(-highest * rate)
    return highest * share, worst, share, tl.sum(out.to(tl.float32))


@triton.jit
def _view_gaps(
    view_ptr, clean, token, inside, K, stride_k, stride_n, VIEW_OVER_CLEAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-ratios [BLOCK_K, BLOCK_T] of the views against the clean image; 0 outside."""
    k = tl.arange(0, BLOCK_K)
    inside = (k < K)[:, None] & inside[None, :]
    places = k.to(tl.int64)[:, None] * stride_k + token[None, :] * stride_n
    view = tl.load(view_ptr + places, inside, other=0.0)
    gap = view - clean[None, :] if VIEW_OVER_CLEAN else clean[None, :] - view
    return tl.where(inside, gap, 0.0)
