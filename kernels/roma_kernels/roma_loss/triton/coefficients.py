"""Two kernels: the coefficients of the clean image's log-probs, and of the views'.

fp32, one program a sequence, which writes each number once: two runs are bitwise equal. See
../triton_backend.py.
"""

import triton
import triton.language as tl

from roma_kernels.roma_loss.triton.kernels import ANYWHERE
from roma_kernels.roma_loss.triton.terms import (
    _divergence,
    _objective,
    _reference_kl,
    _view_gaps,
)


@triton.jit(
    do_not_specialize=["first_token", "last_token"], do_not_specialize_on_alignment=ANYWHERE
)
def _clean_coefficients_kernel(
    dlogp_ptr,  # [M], zeros
    weights_ptr,  # [B]: of each token loss of a sequence
    levels_ptr,  # [B, LEVELS]
    logp_ptr,  # [M]
    old_ptr,  # [M]
    ref_ptr,  # [M] or None
    advantages_ptr,  # [M]
    rollout_ptr,  # [M] or None
    ends_ptr,  # [B] int64
    lengths_ptr,  # [B] int64
    stride_n,
    first_token,  # only tokens in [first_token, last_token)
    last_token,
    shape_0,
    shape_1,
    shape_2,
    shape_3,
    clamp,
    ref_coef,
    OBJECTIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LEVELS: tl.constexpr,
):
    i = tl.program_id(0)
    end = tl.load(ends_ptr + i)
    start = end - tl.load(lengths_ptr + i)
    weight = tl.load(weights_ptr + i)
    level = tl.load(levels_ptr + i * LEVELS)
    last = tl.minimum(end, last_token)
    for first in range(tl.maximum(start, first_token), last, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        inside = token < last
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        old = tl.load(old_ptr + token, inside, other=0.0)
        advantages = tl.load(advantages_ptr + token, inside, other=0.0)
        rollout = 1.0
        if rollout_ptr is not None:
            rollout = tl.load(rollout_ptr + token, inside, other=0.0)
        _, slope, _, _, _ = _objective(
            clean, old, advantages, rollout, level, shape_0, shape_1, shape_2, shape_3, clamp,
            OBJECTIVE, LEVEL,
        )  # fmt: skip
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + token, inside, other=0.0)
            slope += ref_coef * _reference_kl(ref, clean, old, level, clamp, LEVEL, UNBIASED)[1]
        if LEVEL == "mean":
            slope += tl.load(levels_ptr + i * LEVELS + 2)
        tl.store(dlogp_ptr + token, slope * weight, inside)


@triton.jit(
    do_not_specialize=["stride_vk", "M", "first_token", "last_token"],
    do_not_specialize_on_alignment=ANYWHERE,
)
def _view_coefficients_kernel(
    dview_ptr,  # [K, M], zeros
    worst_ptr,  # [B] for WORST_OVER "sequence", 0-dim for "batch"
    penalty_weights_ptr,  # [B]: of each token's divergence, 0 for a wrong rollout
    aux_weights_ptr,  # [B]: of each token's auxiliary loss
    levels_ptr,  # [B, LEVELS]
    logp_ptr,  # [M]
    view_ptr,  # [K, M]
    view_old_ptr,  # [M]
    advantages_ptr,  # [M]
    rollout_ptr,  # [M] or None
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
    shape_0,
    shape_1,
    shape_2,
    shape_3,
    clamp,
    OBJECTIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    VIEW_OVER_CLEAN: tl.constexpr,
    WORST_OVER: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LEVELS: tl.constexpr,
):
    i = tl.program_id(0)
    end = tl.load(ends_ptr + i)
    start = end - tl.load(lengths_ptr + i)
    weight = tl.load(penalty_weights_ptr + i)
    if GATED:
        weight *= tl.load(levels_ptr + i * LEVELS + 4)
    aux_level = tl.load(levels_ptr + i * LEVELS + 1)
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
            rollout = 1.0
            if rollout_ptr is not None:
                rollout = tl.load(rollout_ptr + token, inside, other=0.0)
            _, slope, _, _, _ = _objective(
                tl.load(aux, inside, other=0.0), view_old, advantages, rollout, aux_level,
                shape_0, shape_1, shape_2, shape_3, clamp, OBJECTIVE, LEVEL,
            )  # fmt: skip
            if LEVEL == "mean":
                slope += tl.load(levels_ptr + i * LEVELS + 3)
            slope *= tl.load(aux_weights_ptr + i)
            slopes += tl.where(k[:, None] == sampled, slope[None, :], 0.0)
        places = k.to(tl.int64)[:, None] * M + token[None, :]
        tl.store(dview_ptr + places, slopes, (k < K)[:, None] & inside[None, :])
