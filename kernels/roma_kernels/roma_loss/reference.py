"""The loss from K+1 log-probs per token, as docs/MATH.md sections 2 and 3 write it.

Autograd makes the backward; a loop over sequences; any float dtype.

d = expm1(δ) − δ, δ = ±(a − sg(c)) ;  D_i^k = (1/|y_i|) Σ_t d_{i,t}^k ;  L_inv = (1/B) Σ_i m_i max_k
D_i^k l = −min(ρA, clip(ρ)A), at most −cA where A < 0 ;  L = agg l(clean) + λ_aux·agg l(sampled
view) + λ_inv·L_inv
"""

import torch
from torch import Tensor

from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.packed import PackedBatch, divisors, first_view


def view_loss_reference(
    batch: PackedBatch, config: RomaConfig
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, worst view and metrics, as `roma_kernels.roma_loss.view_api.view_loss` returns them."""
    by_penalty, by_tokens = divisors(batch, config)
    counted = batch.total_tokens.clamp(min=1)
    views, zero = len(batch.view_logp), (batch.logp.nan_to_num() * 0).sum()
    policy, auxiliary, kl_ref = zero, zero, zero
    divergences, penalised, worst_tokens = [], [], torch.zeros_like(batch.sequence)
    ones = torch.zeros(
        3, dtype=batch.logp.dtype, device=batch.logp.device
    )  # clipped above, below; clipped on the view
    for i in range(len(batch.lengths)):
        own = batch.sequence == i
        clean, old, advantages = batch.logp[own], batch.old_logp[own], batch.advantages[own]
        tokens = by_tokens[i]
        if config.main is not None:
            objective, above, below = clipped_objective(clean, old, advantages, config)
            policy = policy + (objective / tokens).sum()
            ones[0] += above.sum()
            ones[1] += below.sum()
            if config.ref_coef and batch.ref_logp is not None:
                kl_ref = kl_ref + (surrogate_kl(batch.ref_logp[own] - clean, config) / tokens).sum()
        if batch.aux_view is not None:
            sampled = batch.view_logp[int(batch.aux_view[i]), own]
            view_old = old if batch.view_old_logp is None else batch.view_old_logp[own]
            objective, above, below = clipped_objective(sampled, view_old, advantages, config)
            auxiliary = auxiliary + (objective / tokens).sum()
            ones[2] += (above | below).sum()
        if views:
            gap = batch.view_logp[:, own] - clean.detach()
            d = surrogate_kl(gap if config.penalty_ratio == "view/clean" else -gap, config)
            count = max(int(own.sum()), 1)
            divergences.append(d.sum(1) / count)
            worst_tokens[own] = d.argmax(0)
            penalised.append(highest(d).sum() / count)

    worst_view = first_view(batch, config)
    penalty, mean = zero, zero
    if views and divergences:
        divergence = torch.stack(divergences, dim=1)  # D [K, B]
        right = batch.correct.to(divergence.dtype)
        worst_view = divergence.argmax(0)
        mean = divergence.mean(0).sum() / batch.total_sequences.clamp(min=1)
        if config.worst_over == "sequence":
            penalty = (right * highest(divergence)).sum() / by_penalty
        elif config.worst_over == "mean":
            penalty = (right * divergence.mean(0)).sum() / by_penalty
        elif config.worst_over == "token":
            penalty, worst_view = (right * torch.stack(penalised)).sum() / by_penalty, worst_tokens
        else:
            of_views = (right * divergence).sum(1)
            penalty, worst_view = highest(of_views) / by_penalty, of_views.argmax()
    loss = (
        policy
        + config.ref_coef * kl_ref
        + config.lambda_aux * auxiliary
        + config.lambda_inv * penalty
    )
    metrics = {
        "loss": loss,
        "pg_loss": policy,
        "pg_clipfrac_higher": ones[0] / counted,
        "pg_clipfrac_lower": ones[1] / counted,
        "ppo_kl": (batch.old_logp - batch.logp).sum() / counted,
        "ref_kl": kl_ref,
        "roma_penalty_worst": penalty,
        "roma_penalty_mean": mean,
        "roma_aux_loss": auxiliary,
        "roma_aux_clipfrac": ones[2] / counted,
    }
    return loss, worst_view, metrics


def surrogate_kl(log_ratio: Tensor, config: RomaConfig) -> Tensor:
    """K3: r − 1 − log r from log r, clamped."""
    delta = log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    return torch.expm1(delta) - delta


def highest(values: Tensor) -> Tensor:
    """Maximum over the first axis, with the whole gradient to the lowest index of a tie."""
    return values.gather(0, values.argmax(0, keepdim=True))[0]


def clipped_objective(
    logp: Tensor, old: Tensor, advantages: Tensor, config: RomaConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token by the dual-clipped surrogate, and where the clip bit: above, below."""
    ratio = torch.exp((logp - old).clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
    free, clipped = (
        ratio * advantages,
        ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages,
    )
    loss = -torch.where(free <= clipped, free, clipped)
    bites = free > clipped
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > ceiling), ceiling, loss)
    return loss, bites & (advantages > 0), bites & (advantages < 0)
