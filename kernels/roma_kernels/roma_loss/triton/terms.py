"""A token's terms of the loss as Triton functions: k3, the clipped surrogate, the views' gaps."""

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
def _clipped_objective(logp, old, advantages, low, high, dual, clamp):
    """Loss of each token, its slope by logp, and whether it is clipped above and below."""
    gap = logp - old
    ratio = tl.exp(tl.minimum(tl.maximum(gap, -clamp), clamp))
    free = ratio * advantages
    clipped = tl.minimum(tl.maximum(ratio, low), high) * advantages
    clips = free > clipped
    loss = -tl.where(clips, clipped, free)
    ceiling = tl.where(advantages < 0, -dual * advantages, float("inf"))
    flat = clips | (loss > ceiling) | (tl.abs(gap) > clamp)
    slope = tl.where(flat, 0.0, -free)
    return tl.minimum(loss, ceiling), slope, clips & (advantages > 0), clips & (advantages < 0)


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
