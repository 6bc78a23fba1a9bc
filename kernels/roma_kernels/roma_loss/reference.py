"""The loss from K+1 log-probs per token, as MATH.md sections 2 and 3 write it, in any float dtype.

    l  = −min(ρA, clip(ρ)A), at most −cA where A < 0          ρ = exp(logp − old_logp)
    d  = expm1(δ) − δ                                         δ = ±(a − sg(c))
    D_i^k = (1/|y_i|) Σ_t d_{i,t}^k
    L_inv = (1/B) Σ_i m_i max_k D_i^k
    L  = agg l(clean) + β·agg k3(ref) + λ_aux·agg l(sampled view) + λ_inv·L_inv

Autograd makes the backward. In float64 this is what every back end is held to, and through
`roma.testing` every kernel of a user's own. It shares no formula with a kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from roma_kernels.roma_loss.batch import Batch
from roma_kernels.roma_loss.config import RomaConfig


@dataclass(frozen=True)
class LossReference:
    """The loss and what it is made of; every scalar is a sum of weighted token terms."""

    loss: Tensor
    worst_view: Tensor
    """int64: [B]; [N] for worst_over "token"; 0-dim for "batch"."""
    metrics: dict[str, Tensor]
    terms: dict[str, Tensor]
    """Token terms of "main" (without the KL), "ref", "aux" and "inv", before λ and β; "mean" and
    "moved" sum to roma_penalty_mean and ppo_kl."""
    penalty: Tensor
    """What the maximum runs over: D [B, K]; d [N, K] for "token"; Σ_i m_i D_i / denominator [1, K]
    for "batch"."""
    log_ratios: dict[str, Tensor]
    """Every log-ratio before its clamp: "main", "ref", "aux", "inv"."""


def roma_loss_reference(
    batch: Batch, config: RomaConfig, *, worst_view: Tensor | None = None
) -> LossReference:
    """Sections 2 and 3 for the N counted tokens of a batch.

    Args:
        batch: trimmed to its counted tokens.
        config: the options but the two lambdas, which the batch holds.
        worst_view: the choice to take instead of the argmax. A kernel in fp32 may choose either of
            two views whose penalties differ by less than rounding; its gradients are then compared
            under its own choice.
    """
    sequence, lengths = batch.sequence, batch.lengths.clamp(min=1).to(batch.logp.dtype)
    log_ratios: dict[str, Tensor] = {}
    empty = batch.logp[:0]
    terms = {"main": empty, "ref": empty, "aux": empty}
    clipped = {"main": (empty, empty), "aux": (empty, empty)}

    def clamped(name: str, log_ratio: Tensor) -> Tensor:
        log_ratios[name] = log_ratio
        return log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)

    def objective(name: str, log_ratio: Tensor) -> Tensor:
        loss, above, below = _surrogate(clamped(name, log_ratio), batch.advantages, config)
        clipped[name] = above, below
        return weight * loss

    sequences = batch.total_sequences.clamp(min=1)
    if config.aggregation == "grpo":
        weight = 1 / (sequences * lengths)[sequence]
    elif config.aggregation == "dapo":
        weight = 1 / batch.total_tokens.clamp(min=1)
    else:
        weight = 1 / (sequences * float(config.max_length or 0))
    if config.main is not None:
        terms["main"] = objective("main", batch.logp - batch.old)
        if config.ref_coef > 0 and batch.ref_logp is not None:
            terms["ref"] = weight * _k3(clamped("ref", batch.ref_logp - batch.logp))
    if batch.aux_view is not None:
        sampled = batch.view_logp.gather(0, batch.aux_view[sequence][None])[0]
        terms["aux"] = objective("aux", sampled - batch.view_old)

    over = sequences if config.penalty_over == "all" else batch.total_correct.clamp(min=1)
    share = batch.correct / over  # [B], of each sequence's divergence in the penalty
    delta = batch.view_logp - batch.logp.detach()
    delta = delta if config.penalty_ratio == "view/clean" else -delta
    d = _k3(clamped("inv", delta))  # [K, N]
    divergence = _sums(d, batch) / lengths  # D [K, B]
    views = len(d)
    penalty, chosen = divergence, _argmax(divergence)
    of_token = chosen[sequence]
    if config.worst_over == "token":
        penalty, chosen = d, _argmax(d)
        of_token = chosen
    elif config.worst_over == "batch":
        penalty = (share * divergence).sum(1, keepdim=True)
        chosen = _argmax(penalty)[0]
        of_token = chosen.expand_as(sequence)
    if worst_view is not None:
        by_sequence = worst_view.ndim == 1 and config.worst_over != "token"
        of_token = worst_view[sequence] if by_sequence else worst_view.expand_as(sequence)
    if config.worst_over == "mean":
        d_worst = d.mean(0) if views else d.sum(0)
    else:
        d_worst = d.gather(0, of_token[None])[0] if views else d.sum(0)
    terms["inv"] = (share / lengths)[sequence] * d_worst

    of_right = (batch.correct / (sequences * lengths))[sequence]
    terms["mean"] = of_right * (d.sum(0) / max(views, 1))
    tokens = batch.total_tokens.clamp(min=1)
    terms["moved"] = (batch.old - batch.logp) / tokens

    total = {name: values.sum() for name, values in terms.items()}
    # The loss depends on both, even where no term does.
    zero = batch.logp[:0].sum() + batch.view_logp[:, :0].sum()
    loss = total["main"] + config.ref_coef * total["ref"]
    loss = loss + batch.lambda_aux * total["aux"] + batch.lambda_inv * total["inv"] + zero
    above, below = (flags.sum() / tokens for flags in clipped["main"])
    aux_above, aux_below = clipped["aux"]
    metrics = {
        "loss": loss,
        "pg_loss": total["main"],
        "pg_clipfrac_higher": above,
        "pg_clipfrac_lower": below,
        "ppo_kl": total["moved"],
        "ref_kl": total["ref"],
        "roma_penalty_worst": total["inv"],
        "roma_penalty_mean": total["mean"],
        "roma_aux_loss": total["aux"],
        "roma_aux_clipfrac": (aux_above + aux_below).sum() / tokens,
    }
    return LossReference(loss, chosen, metrics, terms, penalty.T, log_ratios)


def _surrogate(
    log_ratio: Tensor, advantages: Tensor, config: RomaConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Dual-clipped loss by token; 1 where the ratio is clipped above (A > 0), below (A < 0)."""
    ratio = torch.exp(log_ratio)
    free = ratio * advantages
    cut = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    loss = -torch.where(free <= cut, free, cut)
    clips = (free > cut).to(ratio.dtype)
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > ceiling), ceiling, loss)
    return loss, clips * (advantages > 0), clips * (advantages < 0)


def _k3(delta: Tensor) -> Tensor:
    return torch.expm1(delta) - delta


def _argmax(values: Tensor) -> Tensor:
    """The lowest index of the largest entry over axis 0; 0 where there is none."""
    return values.argmax(0) if len(values) else values.sum(0).long()


def _sums(values: Tensor, batch: Batch) -> Tensor:
    """Sums [..., N] over each sequence, [..., B]."""
    zeros = values.new_zeros((*values.shape[:-1], len(batch.lengths)))
    return zeros.index_add(-1, batch.sequence, values)
