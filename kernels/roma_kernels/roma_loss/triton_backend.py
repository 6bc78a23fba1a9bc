"""The loss from K+1 log-probs per token in Triton: sums, their total, and the coefficients.

    d = expm1(δ) − δ, δ = ±(a − sg(c)) ;  ∂d/∂δ = expm1(δ)
    l = −min(ρA, clip(ρ)A), at most −cA where A < 0 ;  ∂l/∂logp = −ρA where nothing clips, else 0

Three small launches, no wait for the host: one program a sequence sums its tokens, one program adds
the sequences up and settles the worst view of a batch, one program a sequence writes the
coefficients. Reads 4·(K+5) bytes a token twice and writes 4·(K+1): next to the head's 2·D·V FLOP
nothing. fp32, sums in a fixed order, no atomics: two runs are bitwise equal.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.packed import METRICS, PackedBatch, divisors, first_view
from roma_kernels.roma_loss.terms import _clipped_objective, _divergence, _view_gaps

_SUMS = 9  # numbers that the first kernel leaves of each sequence
_BLOCK_T, _BLOCK_B = 256, 64


@triton.jit(do_not_specialize=["stride_vk", "B"])
def _view_loss_sums_kernel(
    sums_ptr,  # [_SUMS, B]
    divergence_ptr,  # [K, B]
    worst_ptr,  # [B], or [N] if WORST_OVER is "token"
    logp_ptr,  # [N]
    view_ptr,  # [K, N]
    old_ptr,  # [N]
    ref_ptr,  # [N] or None
    view_old_ptr,  # [N]
    advantages_ptr,  # [N]
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


@triton.jit(do_not_specialize=["B"])
def _view_loss_total_kernel(
    metrics_ptr,  # [len(METRICS)], in its order
    worst_ptr,  # 0-dim if WORST_OVER is "batch"
    sums_ptr,  # [_SUMS, B]
    divergence_ptr,  # [K, B] or None
    correct_ptr,  # [B] bool
    by_tokens_ptr,  # [B]: divisor of a sequence's token losses
    by_penalty_ptr,  # 0-dim
    sequences_ptr,  # 0-dim
    counted_ptr,  # 0-dim
    B,
    K,
    lambda_inv,
    lambda_aux,
    ref_coef,
    WORST_OVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    sequences = tl.maximum(tl.load(sequences_ptr), 1.0)
    counted = tl.maximum(tl.load(counted_ptr), 1.0)
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
        by_tokens = tl.load(by_tokens_ptr + i, inside, other=1.0)
        policy += tl.sum(tl.load(sums_ptr + 0 * B + i, inside, other=0.0) / by_tokens)
        above += tl.sum(tl.load(sums_ptr + 1 * B + i, inside, other=0.0))
        below += tl.sum(tl.load(sums_ptr + 2 * B + i, inside, other=0.0))
        moved += tl.sum(tl.load(sums_ptr + 3 * B + i, inside, other=0.0))
        reference += tl.sum(tl.load(sums_ptr + 4 * B + i, inside, other=0.0) / by_tokens)
        auxiliary += tl.sum(tl.load(sums_ptr + 5 * B + i, inside, other=0.0) / by_tokens)
        aux_clipped += tl.sum(tl.load(sums_ptr + 6 * B + i, inside, other=0.0))
        if divergence_ptr is not None:
            right = tl.load(correct_ptr + i, inside, other=0).to(tl.float32)
            penalty += tl.sum(tl.load(sums_ptr + 7 * B + i, inside, other=0.0) * right)
            mean += tl.sum(tl.load(sums_ptr + 8 * B + i, inside, other=0.0))
            if WORST_OVER == "batch":
                places = k[:, None] * B + i[None, :]
                both = (k < K)[:, None] & inside[None, :]
                divergence = tl.load(divergence_ptr + places, both, other=0.0)
                of_views += tl.sum(divergence * right[None, :], 1)
    if WORST_OVER == "batch" and divergence_ptr is not None:
        of_views = tl.where(k < K, of_views, -1.0)
        penalty = tl.max(of_views)
        tl.store(worst_ptr, tl.argmax(of_views, 0).to(tl.int64))
    penalty /= tl.load(by_penalty_ptr)
    loss = policy + ref_coef * reference + lambda_aux * auxiliary + lambda_inv * penalty
    tl.store(metrics_ptr + 0, loss)
    tl.store(metrics_ptr + 1, policy)
    tl.store(metrics_ptr + 2, above / counted)
    tl.store(metrics_ptr + 3, below / counted)
    tl.store(metrics_ptr + 4, moved / counted)
    tl.store(metrics_ptr + 5, reference)
    tl.store(metrics_ptr + 6, penalty)
    tl.store(metrics_ptr + 7, mean / sequences)
    tl.store(metrics_ptr + 8, auxiliary)
    tl.store(metrics_ptr + 9, aux_clipped / counted)


@triton.jit(do_not_specialize=["stride_vk", "N", "first_token", "last_token"])
def _view_loss_coefficients_kernel(
    dlogp_ptr,  # [N], zeros
    dview_ptr,  # [K, N], zeros
    worst_ptr,  # [B] for WORST_OVER "sequence", 0-dim for "batch"
    logp_ptr,
    view_ptr,
    old_ptr,
    ref_ptr,
    view_old_ptr,
    advantages_ptr,
    ends_ptr,
    lengths_ptr,
    correct_ptr,
    aux_ptr,
    by_tokens_ptr,
    by_penalty_ptr,
    stride_n,
    stride_vk,
    stride_vn,
    N,
    K,
    first_token,  # only tokens in [first_token, last_token)
    last_token,
    low,
    high,
    dual,
    clamp,
    lambda_inv,
    lambda_aux,
    ref_coef,
    VIEW_OVER_CLEAN: tl.constexpr,
    WORST_OVER: tl.constexpr,
    MAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0)
    length = tl.load(lengths_ptr + i)
    start = tl.load(ends_ptr + i) - length
    by_tokens = tl.load(by_tokens_ptr + i)
    right = tl.load(correct_ptr + i) != 0
    weight = lambda_inv / (tl.maximum(length, 1).to(tl.float32) * tl.load(by_penalty_ptr))
    weight = tl.where(right, weight, 0.0)
    k = tl.arange(0, BLOCK_K)
    last = tl.minimum(start + length, last_token)
    for first in range(tl.maximum(start, first_token), last, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        inside = token < last
        clean = tl.load(logp_ptr + token * stride_n, inside, other=0.0)
        advantages = tl.load(advantages_ptr + token, inside, other=0.0)
        if MAIN:
            old = tl.load(old_ptr + token, inside, other=0.0)
            _, slope, _, _ = _clipped_objective(clean, old, advantages, low, high, dual, clamp)
            if ref_ptr is not None:
                gap = tl.load(ref_ptr + token, inside, other=0.0) - clean
                slope -= ref_coef * _divergence(gap, clamp)[1]
            tl.store(dlogp_ptr + token, slope / by_tokens, inside)
        if view_ptr is not None:
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
                _, slope, _, _ = _clipped_objective(
                    tl.load(aux, inside, other=0.0), view_old, advantages, low, high, dual, clamp
                )
                slope *= lambda_aux / by_tokens
                slopes += tl.where(k[:, None] == sampled, slope[None, :], 0.0)
            places = k.to(tl.int64)[:, None] * N + token[None, :]
            tl.store(dview_ptr + places, slopes, (k < K)[:, None] & inside[None, :])


class _Launch(NamedTuple):
    """What the launches of one batch share."""

    by_penalty: Tensor
    by_tokens: Tensor
    ends: Tensor
    view_logp: Tensor | None
    ref_logp: Tensor | None
    view_old_logp: Tensor
    strides: tuple[int, ...]
    clips: tuple[float, ...]
    lambdas: tuple[float, ...]
    options: dict[str, Any]


def _launch(batch: PackedBatch, config: RomaConfig) -> _Launch:
    views = len(batch.view_logp)
    block_k = triton.next_power_of_2(max(views, 1))
    # As floats even if given as whole numbers, for which Triton would compile kernels of their own.
    dual = float("inf") if config.dual_clip is None else float(config.dual_clip)
    return _Launch(
        *divisors(batch, config),
        ends=batch.lengths.cumsum(0),
        view_logp=batch.view_logp if views else None,
        ref_logp=batch.ref_logp if config.ref_coef else None,
        view_old_logp=batch.old_logp if batch.view_old_logp is None else batch.view_old_logp,
        strides=(batch.logp.stride(0), *batch.view_logp.stride()),
        clips=(1.0 - config.clip_low, 1.0 + config.clip_high, dual, float(config.log_ratio_clamp)),
        lambdas=(float(config.lambda_inv), float(config.lambda_aux), float(config.ref_coef)),
        options={
            "VIEW_OVER_CLEAN": config.penalty_ratio == "view/clean",
            "WORST_OVER": config.worst_over,
            "MAIN": config.main is not None,
            "BLOCK_K": block_k,
            "BLOCK_T": max(_BLOCK_T // block_k, 16),
        },
    )


def view_loss_totals(batch: PackedBatch, config: RomaConfig) -> tuple[Tensor, Tensor]:
    """Metrics [10], of which the first is the loss, and the worst view."""
    (views, _), sequences = batch.view_logp.shape, len(batch.lengths)
    launch, device = _launch(batch, config), batch.logp.device
    sums = torch.zeros(_SUMS, sequences, device=device)
    divergence = torch.zeros(views, sequences, device=device) if views else None
    worst = first_view(batch, config)
    metrics = torch.zeros(len(METRICS), device=device)
    if sequences:
        _view_loss_sums_kernel[(sequences,)](
            sums, divergence, worst, batch.logp, launch.view_logp, batch.old_logp, launch.ref_logp,
            launch.view_old_logp, batch.advantages, launch.ends, batch.lengths, batch.aux_view,
            *launch.strides, sequences, views, *launch.clips, **launch.options,
        )  # fmt: skip
    _view_loss_total_kernel[(1,)](
        metrics, worst, sums, divergence, batch.correct, launch.by_tokens, launch.by_penalty,
        batch.total_sequences, batch.total_tokens, sequences, views, *launch.lambdas,
        WORST_OVER=config.worst_over, BLOCK_K=launch.options["BLOCK_K"], BLOCK_B=_BLOCK_B,
    )  # fmt: skip
    return metrics, worst


def view_loss_coefficients(
    batch: PackedBatch,
    config: RomaConfig,
    worst: Tensor,
    dlogp: Tensor,
    dview_logp: Tensor,
    tokens: slice,
) -> None:
    """Fills the coefficients `dlogp` [N] and `dview_logp` [K, N] of some tokens; zeros elsewhere.

    `worst` [B] or 0-dim is looked at if worst_over is "sequence" or "batch".
    """
    (views, count), sequences = batch.view_logp.shape, len(batch.lengths)
    launch = _launch(batch, config)
    if sequences:
        _view_loss_coefficients_kernel[(sequences,)](
            dlogp, dview_logp, worst, batch.logp, launch.view_logp, batch.old_logp,
            launch.ref_logp, launch.view_old_logp, batch.advantages, launch.ends, batch.lengths,
            batch.correct, batch.aux_view, launch.by_tokens, launch.by_penalty, *launch.strides,
            count, views, tokens.start, tokens.stop, *launch.clips, *launch.lambdas,
            **launch.options,
        )  # fmt: skip


def view_loss_fwd(
    batch: PackedBatch, config: RomaConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics [10], and the coefficients by logp [N] and view_logp [K, N].

    Tokens beyond Σ lengths are not looked at, and their coefficients are 0.
    """
    metrics, worst = view_loss_totals(batch, config)
    dlogp, dview_logp = (
        torch.zeros(x.shape, device=x.device) for x in (batch.logp, batch.view_logp)
    )
    everything = slice(0, len(batch.logp))
    view_loss_coefficients(batch, config, worst, dlogp, dview_logp, everything)
    return metrics[0].clone(), worst, metrics, dlogp, dview_logp
