"""The loss from K+1 log-probs per token in PyTorch, and one analytic coefficient per (view, token).

    d = expm1(δ) − δ          δ = ±(a − sg(c))             ∂d/∂δ = expm1(δ)
    l = −min(ρA, clip(ρ)A)    at most −cA where A < 0      ∂l/∂logp = −ρA where nothing clips

Reads and writes 4·(K+1) bytes a token each way, next to the linear head's 2·D·V products nothing.
The coefficients are exact zeros where MATH section 6 says so (other views, wrong rollouts, clipped
tokens), which is what lets `linear_logprob` skip those rows. Same dtype as the log-probs (fp32).
Two runs are bitwise equal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from roma_kernels.roma_loss.batch import METRICS, Batch, divisors, first_view
from roma_kernels.roma_loss.config import RomaConfig

_SERIES_BELOW = 0.5  # |δ| up to which eight terms of the series hold to 5e-8 relative


class _Objective(NamedTuple):
    loss: Tensor  # [N]
    slope: Tensor  # [N], ∂loss/∂logp
    above: Tensor  # [N] bool
    below: Tensor  # [N] bool


def k3(delta: Tensor) -> Tensor:
    """k3 = expm1(δ) − δ to full relative precision, never negative.

    The difference cancels for small δ (relative error ε/δ in fp32), which is where the worst view
    is decided; the series δ²·Σ_n δⁿ/(n+2)! does not. Its derivative expm1(δ) is δ + k3.
    """
    if delta.dtype == torch.float64:
        return torch.expm1(delta) - delta
    series = torch.full_like(delta, 1 / 362880)
    for factorial in (40320, 5040, 720, 120, 24, 6, 2):
        series = series.mul_(delta).add_(1 / factorial)
    return torch.where(
        delta.abs() < _SERIES_BELOW, delta.square() * series, torch.expm1(delta) - delta
    )


def _clipped_objective(
    logp: Tensor, old: Tensor, advantages: Tensor, config: RomaConfig
) -> _Objective:
    gap = logp - old
    ratio = torch.exp(gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
    free, clipped = (
        ratio * advantages,
        ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages,
    )
    clips = free > clipped
    loss = -torch.where(clips, clipped, free)
    flat = clips | (gap.abs() > config.log_ratio_clamp)
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        capped = (advantages < 0) & (loss > ceiling)
        loss, flat = torch.where(capped, ceiling, loss), flat | capped
    return _Objective(
        loss, torch.where(flat, 0, -free), clips & (advantages > 0), clips & (advantages < 0)
    )


def _divergence(minuend: Tensor, subtrahend: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The k3 estimator of minuend − subtrahend, and its slope by the minuend."""
    gap = minuend - subtrahend
    delta = gap.clamp(-clamp, clamp)
    d = k3(delta)
    return d, torch.where(gap.abs() > clamp, 0, delta + d)


def _penalty(
    batch: Batch, config: RomaConfig, divisor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_inv, Σ_i m_i mean_k D_i^k / total_sequences, the worst view, ∂L_inv/∂view_logp [K, N]."""
    if config.penalty_ratio == "view/clean":
        d, slope = _divergence(batch.view_logp, batch.logp, config.log_ratio_clamp)
    else:
        d, slope = _divergence(
            batch.logp.expand_as(batch.view_logp), batch.view_logp, config.log_ratio_clamp
        )
        slope = -slope
    views = len(batch.view_logp)
    lengths = batch.lengths.clamp(min=1)
    right = batch.correct.to(d.dtype)
    divergence = _sequence_sums(d, batch) / lengths  # D [K, B]
    worst = divergence.argmax(0)  # the first of equal maxima, as everywhere below
    chosen: Tensor  # [K, N]: the share of each view in the maximum
    which = torch.arange(views, device=d.device)[:, None]
    if config.worst_over == "sequence":
        penalty, chosen = divergence.amax(0), which == worst[batch.sequence]
    elif config.worst_over == "mean":
        penalty, chosen = divergence.mean(0), torch.full_like(d, 1 / views)
    elif config.worst_over == "token":
        worst = d.argmax(0)
        penalty, chosen = _sequence_sums(d.amax(0), batch) / lengths, which == worst
    else:
        worst = (right * divergence).sum(1).argmax()
        penalty, chosen = divergence[worst], (which == worst).expand_as(d)
    coefficient = (
        torch.where(chosen != 0, chosen * slope, 0) * (right / lengths)[batch.sequence] / divisor
    )
    mean = (right * divergence.mean(0)).sum() / batch.total_sequences.clamp(min=1)
    return (right * penalty).sum() / divisor, mean, worst, coefficient


def _sequence_sums(tokens: Tensor, batch: Batch) -> Tensor:
    """Sums [..., N] over each sequence to [..., B], in a fixed order of additions."""
    if not len(batch.lengths):
        return tokens.new_zeros((*tokens.shape[:-1], 0))
    sums = torch.segment_reduce(
        tokens.movedim(-1, 0).contiguous(), "sum", lengths=batch.lengths, axis=0, initial=0
    )
    return sums.movedim(0, -1)


def combine(batch: Batch, config: RomaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics [10], and the coefficients by logp [M] and view_logp [K, M].

    The coefficients of the tokens that do not count are 0.
    """
    dlogp = batch.logp.new_zeros(batch.logp.shape)
    dview_logp = batch.view_logp.new_zeros(batch.view_logp.shape)
    worst, counted = first_view(batch, config), batch.trimmed()
    n = len(counted.logp)
    loss, found, metrics = _combine(counted, config, dlogp[:n], dview_logp[:, :n])
    if config.worst_over == "token":
        worst[:n] = found
    else:
        worst = found
    return loss, worst, metrics, dlogp, dview_logp


def _combine(
    batch: Batch, config: RomaConfig, dlogp: Tensor, dview_logp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, worst view and metrics of counted tokens; adds the coefficients to two tensors of 0."""
    penalty_divisor, sequence_divisors = divisors(batch, config)
    token_divisors = sequence_divisors[batch.sequence]
    total_tokens = batch.total_tokens.clamp(min=1)
    zero = batch.logp.new_zeros(())
    metrics = dict.fromkeys(METRICS, zero)
    if config.main is not None:
        clean = _clipped_objective(batch.logp, batch.old, batch.advantages, config)
        metrics["pg_loss"] = (clean.loss / token_divisors).sum()
        metrics["pg_clipfrac_higher"] = clean.above.sum() / total_tokens
        metrics["pg_clipfrac_lower"] = clean.below.sum() / total_tokens
        dlogp += clean.slope / token_divisors
        if config.ref_coef and batch.ref_logp is not None:
            d, slope = _divergence(batch.ref_logp, batch.logp, config.log_ratio_clamp)
            metrics["ref_kl"] = (d / token_divisors).sum()
            dlogp -= config.ref_coef * slope / token_divisors
    if batch.aux_view is not None:
        index = batch.aux_view[batch.sequence][None]
        sampled = batch.view_logp.gather(0, index)[0]
        aux = _clipped_objective(sampled, batch.view_old, batch.advantages, config)
        metrics["roma_aux_loss"] = (aux.loss / token_divisors).sum()
        metrics["roma_aux_clipfrac"] = (aux.above | aux.below).sum() / total_tokens
        dview_logp.scatter_(0, index, (batch.lambda_aux * aux.slope / token_divisors)[None])
    worst = first_view(batch, config)
    if len(batch.view_logp):
        penalty, mean, worst, coefficient = _penalty(batch, config, penalty_divisor)
        metrics["roma_penalty_worst"], metrics["roma_penalty_mean"] = penalty, mean
        dview_logp += batch.lambda_inv * coefficient
    metrics["ppo_kl"] = (batch.old - batch.logp).sum() / total_tokens
    loss = metrics["pg_loss"] + config.ref_coef * metrics["ref_kl"]
    loss = (
        loss
        + batch.lambda_aux * metrics["roma_aux_loss"]
        + batch.lambda_inv * metrics["roma_penalty_worst"]
    )
    metrics["loss"] = loss
    return loss, worst, torch.stack([metrics[name] for name in METRICS])
