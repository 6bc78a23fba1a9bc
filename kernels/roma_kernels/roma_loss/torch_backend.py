"""The loss from K+1 log-probs per token in PyTorch, and one analytic coefficient per (view, token).

    d = expm1(δ) − δ          δ = ±(a − sg(c))             ∂d/∂δ = expm1(δ)
    l = −min(ρA, clip(ρ)A)    at most −cA where A < 0      ∂l/∂x = −ρA where nothing clips
    x = logp − old_logp, or its mean over the sequence, whose slope all of its tokens share

That is main="grpo"; the others [TRL 1.16], with ∂l/∂x of sapo and ∂l/∂logp of the two that
multiply a log-prob:

    cispo    −sg(min(ρ, ε_high))·A·logp
    sapo     −(4/κ)·σ(κ(ρ − 1))·A                              κ₊ for A > 0, else κ₋
    vespo    −sg(φ(w))·A·logp,  log φ = λ + k·log w − λ·w      k₊, λ₊ for A ≥ 0, else k₋, λ₋

Reads and writes 4·(K+1) bytes a token each way, next to the linear head's 2·D·V products nothing.
The coefficients are exact zeros where MATH section 6 says so (other views, wrong rollouts, clipped
tokens), which is what lets `linear_logprob` skip those rows. Same dtype as the log-probs (fp32).
Two runs are bitwise equal.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from roma_kernels.roma_loss.batch import METRICS, Batch, divisors, first_view
from roma_kernels.roma_loss.config import LOG_WEIGHTS, RomaConfig

_SERIES_BELOW = 0.5  # |δ| up to which eight terms of the series hold to 5e-8 relative


class _Objective(NamedTuple):
    """A loss by token."""

    loss: Tensor  # [N]
    slope: Tensor  # [N], ∂loss/∂gap of grpo and sapo, ∂loss/∂logp of cispo and vespo
    above: Tensor  # [N] bool
    below: Tensor  # [N] bool


class _Penalty(NamedTuple):
    loss: Tensor  # L_inv
    mean: Tensor  # Σ_i m_i mean_k D_i^k / total_sequences
    gated: Tensor  # share of right pairs that the gate leaves out
    worst: Tensor
    slopes: Tensor  # [K, N], ∂L_inv/∂view_logp


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


def _divergence(minuend: Tensor, subtrahend: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The k3 estimator of minuend − subtrahend, and its slope by the minuend."""
    gap = minuend - subtrahend
    delta = gap.clamp(-clamp, clamp)
    d = k3(delta)
    return d, torch.where(gap.abs() > clamp, 0, delta + d)


_Form = Callable[[Tensor, Tensor, Tensor, RomaConfig], _Objective]


def _objective_of(config: RomaConfig) -> _Form:
    """The form of the main and the auxiliary loss, of logp, gap and advantages [N]."""
    forms = {"grpo": _grpo, "cispo": _cispo, "sapo": _sapo, "vespo": _vespo}
    return forms[config.objective]


def _ratio(gap: Tensor, config: RomaConfig) -> tuple[Tensor, Tensor]:
    """ρ, and where its clamp leaves no gradient."""
    clamp = config.log_ratio_clamp
    return torch.exp(gap.clamp(-clamp, clamp)), gap.abs() > clamp


def _grpo(logp: Tensor, gap: Tensor, advantages: Tensor, config: RomaConfig) -> _Objective:
    ratio, flat = _ratio(gap, config)
    free = ratio * advantages
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    clips = free > clipped
    loss = -torch.where(clips, clipped, free)
    flat = flat | clips
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        capped = (advantages < 0) & (loss > ceiling)
        loss, flat = torch.where(capped, ceiling, loss), flat | capped
    slope = torch.where(flat, 0, -free)
    return _Objective(loss, slope, clips & (advantages > 0), clips & (advantages < 0))


def _cispo(logp: Tensor, gap: Tensor, advantages: Tensor, config: RomaConfig) -> _Objective:
    ratio, _ = _ratio(gap, config)
    slope = -ratio.clamp(max=config.clip_high) * advantages
    above = (ratio > config.clip_high) & (advantages > 0)
    return _Objective(slope * logp, slope, above, torch.zeros_like(above))


def _sapo(logp: Tensor, gap: Tensor, advantages: Tensor, config: RomaConfig) -> _Objective:
    ratio, flat = _ratio(gap, config)
    positive, never = config.sapo_temperature
    kappa = torch.where(advantages > 0, positive, never).to(ratio.dtype)
    z = kappa * (ratio - 1)
    loss = -4 / kappa * torch.sigmoid(z) * advantages
    # σ(−z), not 1 − σ(z), which loses all digits where σ(z) is near 1.
    slope = -4 * torch.sigmoid(z) * torch.sigmoid(-z) * ratio * advantages
    none = torch.zeros_like(flat)
    return _Objective(loss, torch.where(flat, 0, slope), none, none)


def _vespo(logp: Tensor, gap: Tensor, advantages: Tensor, config: RomaConfig) -> _Objective:
    k_high, rate_high, k_low, rate_low = config.vespo
    high = advantages >= 0
    k = torch.where(high, k_high, k_low).to(gap.dtype)
    rate = torch.where(high, rate_high, rate_low).to(gap.dtype)
    slope = -torch.exp(rate + k * gap - rate * torch.exp(gap)) * advantages
    none = torch.zeros_like(high)
    return _Objective(slope * logp, slope, none, none)


def _penalty(batch: Batch, config: RomaConfig, divisor: Tensor) -> _Penalty:
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
    pairs = batch.total_sequences.clamp(min=1) * views
    gated = right.new_zeros(())
    chosen: Tensor  # [K, N]: the share of each view in the maximum
    which = torch.arange(views, device=d.device)[:, None]
    if batch.gate_bound is not None:
        out = divergence > batch.gate_bound
        gated = (out & batch.correct).sum() / pairs
        penalty, worst, share = _gated(divergence, out, config)
        chosen = (which == worst[batch.sequence]) * share[batch.sequence]
    elif config.worst_over == "sequence":
        penalty, chosen = divergence.amax(0), which == worst[batch.sequence]
    elif config.worst_over == "mean":
        penalty, chosen = divergence.mean(0), torch.full_like(d, 1 / views)
    elif config.worst_over == "token":
        worst = d.argmax(0)
        penalty, chosen = _sequence_sums(d.amax(0), batch) / lengths, which == worst
    else:
        worst = (right * divergence).sum(1).argmax()
        penalty, chosen = divergence[worst], (which == worst).expand_as(d)
    slopes = (
        torch.where(chosen != 0, chosen * slope, 0) * (right / lengths)[batch.sequence] / divisor
    )
    mean = (right * divergence.mean(0)).sum() / batch.total_sequences.clamp(min=1)
    return _Penalty((right * penalty).sum() / divisor, mean, gated, worst, slopes)


def _gated(divergence: Tensor, out: Tensor, config: RomaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty, worst view (−1: none is left) and weight of each sequence, [B]."""
    highest, worst = divergence.masked_fill(out, -torch.inf).max(0)
    none = out.all(0)
    highest = highest.masked_fill(none, 0)
    share = torch.ones_like(highest)
    if config.gate_tau is not None:
        share = torch.exp(-highest / config.gate_tau)
    return highest * share, worst.masked_fill(none, -1), share


def _sequence_sums(tokens: Tensor, batch: Batch) -> Tensor:
    """Sums [..., N] over each sequence to [..., B], in a fixed order of additions."""
    if not len(batch.lengths):
        return tokens.new_zeros((*tokens.shape[:-1], 0))
    sums = torch.segment_reduce(
        tokens.movedim(-1, 0).contiguous(), "sum", lengths=batch.lengths, axis=0, initial=0
    )
    return sums.movedim(0, -1)


def _shared(slopes: Tensor, batch: Batch) -> Tensor:
    """Slopes [N] by the mean of a sequence, as slopes by each token of it."""
    return (_sequence_sums(slopes, batch) / batch.lengths.clamp(min=1))[batch.sequence]


def _log_ratios(logp: Tensor, old: Tensor, batch: Batch, config: RomaConfig) -> Tensor:
    """[N]: the log of each token's ratio, not clamped; of vespo's weight, clamped."""
    gap = logp - old
    if config.main == "vespo":
        sums = _sequence_sums(gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp), batch)
        if batch.rollout_weight is not None:
            sums += _sequence_sums(batch.rollout_weight.log().clamp(*LOG_WEIGHTS), batch)
        return sums.clamp(*LOG_WEIGHTS)[batch.sequence]
    return _shared(gap, batch) if config.ratio_level == "sequence" else gap


def _objective(
    logp: Tensor, gap: Tensor, divisor: Tensor, batch: Batch, config: RomaConfig
) -> _Objective:
    """The losses of an image, each over its divisor [N], and their slopes by each log-prob."""
    found = _objective_of(config)(logp, gap, batch.advantages, config)
    loss, slope = found.loss / divisor, found.slope / divisor
    if batch.rollout_weight is not None and config.main != "vespo":
        loss, slope = loss * batch.rollout_weight, slope * batch.rollout_weight
    if config.ratio_level == "sequence" and config.objective in ("grpo", "sapo"):
        slope = _shared(slope, batch)
    return found._replace(loss=loss, slope=slope)


def _reference_kl(
    gap: Tensor, divisor: Tensor, batch: Batch, config: RomaConfig
) -> tuple[Tensor, Tensor]:
    """KL to the reference, its sum, and its slopes by each log-prob; gap: the ratio's log."""
    assert batch.ref_logp is not None
    d, slope = _divergence(batch.ref_logp, batch.logp, config.log_ratio_clamp)
    d, slope = d / divisor, -slope / divisor
    if not config.ref_unbiased:
        return d.sum(), slope
    ratio = torch.exp(gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
    d, slope = d * ratio, slope * ratio
    by_ratio = torch.where(gap.abs() > config.log_ratio_clamp, 0, d)
    if config.ratio_level == "sequence":
        by_ratio = _shared(by_ratio, batch)
    return d.sum(), slope + by_ratio


def combine(batch: Batch, config: RomaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics, and the coefficients by logp [M] and view_logp [K, M].

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
        gap = _log_ratios(batch.logp, batch.old, batch, config)
        clean = _objective(batch.logp, gap, token_divisors, batch, config)
        metrics["pg_loss"] = clean.loss.sum()
        metrics["pg_clipfrac_higher"] = clean.above.sum() / total_tokens
        metrics["pg_clipfrac_lower"] = clean.below.sum() / total_tokens
        dlogp += clean.slope
        if config.ref_coef and batch.ref_logp is not None:
            if config.main == "vespo":
                gap = batch.logp - batch.old
            metrics["ref_kl"], slope = _reference_kl(gap, token_divisors, batch, config)
            dlogp += config.ref_coef * slope
    if batch.aux_view is not None:
        index = batch.aux_view[batch.sequence][None]
        sampled = batch.view_logp.gather(0, index)[0]
        gap = _log_ratios(sampled, batch.view_old, batch, config)
        aux = _objective(sampled, gap, token_divisors, batch, config)
        metrics["roma_aux_loss"] = aux.loss.sum()
        metrics["roma_aux_clipfrac"] = (aux.above | aux.below).sum() / total_tokens
        dview_logp.scatter_(0, index, (batch.lambda_aux * aux.slope)[None])
    worst = first_view(batch, config)
    if len(batch.view_logp):
        penalty = _penalty(batch, config, penalty_divisor)
        metrics["roma_penalty_worst"], metrics["roma_penalty_mean"] = penalty.loss, penalty.mean
        metrics["roma_gated"], worst = penalty.gated, penalty.worst
        dview_logp += batch.lambda_inv * penalty.slopes
    metrics["ppo_kl"] = (batch.old - batch.logp).sum() / total_tokens
    loss = metrics["pg_loss"] + config.ref_coef * metrics["ref_kl"]
    loss = (
        loss
        + batch.lambda_aux * metrics["roma_aux_loss"]
        + batch.lambda_inv * metrics["roma_penalty_worst"]
    )
    metrics["loss"] = loss
    return loss, worst, torch.stack([metrics[name] for name in METRICS])
