"""The loss from K+1 log-probs per token, as MATH.md sections 2 and 3 write it, in any float dtype.

    l  = −min(ρA, clip(ρ)A), at most −cA where A < 0          ρ = exp(logp − old_logp)
    d  = expm1(δ) − δ                                         δ = ±(a − sg(c))
    D_i^k = (1/|y_i|) Σ_t d_{i,t}^k
    L_inv = (1/B) Σ_i m_i max_k D_i^k
    L  = agg w·l(clean) + β·agg k3(ref) − η·mean H + λ_aux·agg w·l(sampled view) + λ_inv·L_inv

l is that of main="grpo"; `token_losses` has the others. Autograd makes the backward. In float64
this is what every back end is held to, and through `roma.testing` every kernel of a user's own. It
shares no formula with a kernel.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from roma_kernels.roma_loss.batch import Batch
from roma_kernels.roma_loss.config import LOG_WEIGHTS, RomaConfig


@dataclass(frozen=True)
class LossReference:
    """The loss and what it is made of; every scalar is a sum of weighted token terms."""

    loss: Tensor
    worst_view: Tensor
    """int64: [B], −1 where the gate leaves no view; [N] for worst_over "token"; 0-dim for
    "batch"."""
    metrics: dict[str, Tensor]
    terms: dict[str, Tensor]
    """Token terms of "main" (without the KL), "ref", "aux" and "inv", before λ and β, and of
    "entropy", before η; "mean" and "moved" sum to roma_penalty_mean and ppo_kl."""
    penalty: Tensor
    """What the maximum runs over: D [B, K]; d [N, K] for "token"; Σ_i m_i D_i / denominator [1, K]
    for "batch"."""
    gated: Tensor
    """[B, K] bool: what the gate leaves out of the maximum."""
    log_ratios: dict[str, Tensor]
    """Every log-ratio before its clamp: "main", "ref", "aux", "inv"."""
    inputs: dict[str, tuple[Tensor, Tensor, Tensor]]
    """Of "main" and "aux", [N] each: logp and log-ratio as `token_losses` takes them, and the
    weight of what it returns."""


@dataclass
class _Ratios:
    """The log-ratios on the way, and what is kept of them."""

    batch: Batch
    config: RomaConfig
    seen: dict[str, Tensor] = field(default_factory=dict)

    def clamped(self, name: str, log_ratio: Tensor) -> Tensor:
        """A log-ratio within ± log_ratio_clamp."""
        self.seen[name] = log_ratio
        return log_ratio.clamp(-self.config.log_ratio_clamp, self.config.log_ratio_clamp)

    def of(self, name: str, logp: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """[N]: the log of main's ratio, and of the one that an unbiased KL is multiplied by."""
        batch, x = self.batch, logp - old
        if self.config.main == "vespo":
            by_token = self.clamped(name, x)
            log_w = _sums(by_token, batch)
            if batch.rollout_weight is not None:
                log_w = log_w + _sums(batch.rollout_weight.log().clamp(*LOG_WEIGHTS), batch)
            return log_w.clamp(*LOG_WEIGHTS)[batch.sequence], by_token
        if self.config.ratio_level == "sequence":
            x = (_sums(x, batch) / batch.lengths.clamp(min=1))[batch.sequence]
        by_token = self.clamped(name, x)
        return by_token, by_token


def roma_loss_reference(
    batch: Batch,
    config: RomaConfig,
    *,
    entropy: Tensor | None = None,
    worst_view: Tensor | None = None,
) -> LossReference:
    """Sections 2 and 3 for the N counted tokens of a batch.

    Args:
        batch: trimmed to its counted tokens.
        config: the options but those that may be tensors, which the batch holds.
        entropy: [N], where entropy_coef > 0.
        worst_view: the choice to take instead of the argmax. A kernel in fp32 may choose either of
            two views whose penalties differ by less than rounding; its gradients are then compared
            under its own choice.
    """
    empty = batch.logp[:0]
    terms = {"main": empty, "ref": empty, "aux": empty, "entropy": empty}
    clipped = {"main": (empty, empty), "aux": (empty, empty)}
    ratios, weight = _Ratios(batch, config), _token_weights(batch, config)
    sampler = batch.rollout_weight
    if sampler is None or config.main == "vespo":  # which has it in its weight
        sampler = torch.ones_like(batch.logp)

    inputs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def objective(name: str, logp: Tensor, log_ratio: Tensor) -> Tensor:
        loss, above, below, _ = token_losses(logp, log_ratio, batch.advantages, config)
        clipped[name] = above, below
        inputs[name] = logp, log_ratio, weight * sampler
        return weight * sampler * loss

    tokens = batch.total_tokens.clamp(min=1)
    if config.main is not None:
        log_ratio, of_kl = ratios.of("main", batch.logp, batch.old)
        terms["main"] = objective("main", batch.logp, log_ratio)
        if config.ref_coef > 0 and batch.ref_logp is not None:
            terms["ref"] = weight * _k3(ratios.clamped("ref", batch.ref_logp - batch.logp))
            if config.ref_unbiased:
                terms["ref"] = terms["ref"] * torch.exp(of_kl)
        if config.entropy_coef > 0 and entropy is not None:
            terms["entropy"] = entropy / tokens
    if batch.aux_view is not None:
        sampled = batch.view_logp.gather(0, batch.aux_view[batch.sequence][None])[0]
        log_ratio, _ = ratios.of("aux", sampled, batch.view_old)
        terms["aux"] = objective("aux", sampled, log_ratio)
    terms["moved"] = (batch.old - batch.logp) / tokens
    delta = batch.view_logp - batch.logp.detach()
    delta = delta if config.penalty_ratio == "view/clean" else -delta
    d = _k3(ratios.clamped("inv", delta))  # [K, N]
    chosen, penalty, gated = _penalty(batch, config, d, worst_view, terms)

    total = {name: values.sum() for name, values in terms.items()}
    # The loss depends on both, even where no term does.
    zero = batch.logp[:0].sum() + batch.view_logp[:, :0].sum()
    loss = total["main"] + config.ref_coef * total["ref"] - config.entropy_coef * total["entropy"]
    loss = loss + batch.lambda_aux * total["aux"] + batch.lambda_inv * total["inv"] + zero
    above, below = (flags.sum() / tokens for flags in clipped["main"])
    aux_above, aux_below = clipped["aux"]
    pairs = batch.total_sequences.clamp(min=1) * max(len(d), 1)
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
        "entropy": total["entropy"],
        "roma_gated": (gated & batch.correct).sum() / pairs,
    }
    return LossReference(loss, chosen, metrics, terms, penalty.T, gated.T, ratios.seen, inputs)


def _token_weights(batch: Batch, config: RomaConfig) -> Tensor:
    """Weight of each token's loss, [N]."""
    sequences, lengths = batch.total_sequences.clamp(min=1), batch.lengths.clamp(min=1)
    if config.aggregation == "grpo":
        return 1 / (sequences * lengths.to(batch.logp.dtype))[batch.sequence]
    if config.aggregation == "dapo":
        weight = 1 / batch.total_tokens.clamp(min=1)
    elif config.aggregation == "bnpo":
        weight = len(lengths) / sequences / max(len(batch.sequence), 1)
    elif config.aggregation == "luspo":
        weight = 1 / sequences
    else:
        weight = 1 / (sequences * float(config.max_length or 0))
    return weight.expand_as(batch.logp)


def token_losses(
    logp: Tensor, log_ratio: Tensor, advantages: Tensor, config: RomaConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By token: main's loss; 1 where the ratio is clipped above (A > 0), below (A < 0).

    And what stands before −A·logp, not yet a constant, where that is the loss.
    """
    never, positive = torch.zeros_like(advantages), advantages > 0
    if config.main == "vespo":
        (k_high, rate_high), (k_low, rate_low) = config.vespo[:2], config.vespo[2:]
        high = torch.exp(rate_high + k_high * log_ratio - rate_high * torch.exp(log_ratio))
        low = torch.exp(rate_low + k_low * log_ratio - rate_low * torch.exp(log_ratio))
        phi = torch.where(advantages >= 0, high, low)
        return -phi.detach() * advantages * logp, never, never, phi
    ratio = torch.exp(log_ratio)
    if config.main == "cispo":
        capped = ratio.clamp(max=config.clip_high)
        above = ((ratio > config.clip_high) & positive).to(ratio.dtype)
        return -capped.detach() * advantages * logp, above, never, capped
    if config.main == "sapo":
        high, low = (torch.sigmoid(k * (ratio - 1)) * 4 / k for k in config.sapo_temperature)
        return -torch.where(positive, high, low) * advantages, never, never, None
    free = ratio * advantages
    cut = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    loss = -torch.where(free <= cut, free, cut)
    clips = (free > cut).to(ratio.dtype)
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        loss = torch.where((advantages < 0) & (loss > ceiling), ceiling, loss)
    return loss, clips * positive, clips * (advantages < 0), None


def _penalty(
    batch: Batch,
    config: RomaConfig,
    d: Tensor,
    worst_view: Tensor | None,
    terms: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The worst views, what the maximum runs over, and the gated [K, B]; adds "inv" and "mean"."""
    sequence, lengths = batch.sequence, batch.lengths.clamp(min=1).to(d.dtype)
    sequences = batch.total_sequences.clamp(min=1)
    over = sequences if config.penalty_over == "all" else batch.total_correct.clamp(min=1)
    share = batch.correct / over  # [B], of each sequence's divergence in the penalty
    divergence = _sums(d, batch) / lengths  # D [K, B]
    views = len(d)
    gated = torch.zeros_like(divergence, dtype=torch.bool)
    if batch.gate_bound is not None:
        gated = divergence > batch.gate_bound
    penalty, chosen = divergence, _argmax(divergence.masked_fill(gated, -torch.inf))
    if views:
        chosen = torch.where(gated.all(0), -1, chosen)
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
        d_worst = d.gather(0, of_token.clamp(min=0)[None])[0] if views else d.sum(0)
        d_worst = torch.where(of_token >= 0, d_worst, 0)
    terms["inv"] = (share / lengths)[sequence] * d_worst
    if config.gate_tau is not None:
        of_sequence = _sums(d_worst.detach(), batch) / lengths
        terms["inv"] = terms["inv"] * torch.exp(-of_sequence / config.gate_tau)[sequence]
    of_right = (batch.correct / (sequences * lengths))[sequence]
    terms["mean"] = of_right * (d.sum(0) / max(views, 1))
    return chosen, penalty, gated


def _k3(delta: Tensor) -> Tensor:
    return torch.expm1(delta) - delta


def _argmax(values: Tensor) -> Tensor:
    """The lowest index of the largest entry over axis 0; 0 where there is none."""
    return values.argmax(0) if len(values) else values.sum(0).long()


def _sums(values: Tensor, batch: Batch) -> Tensor:
    """Sums [..., N] over each sequence, [..., B]."""
    zeros = values.new_zeros((*values.shape[:-1], len(batch.lengths)))
    return zeros.index_add(-1, batch.sequence, values)
