"""`PackedBatch`: what the view loss works on, counted tokens only, sequence after sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from roma_kernels.roma_loss.config import RomaConfig

METRICS = {
    "loss": "L = pg_loss + β·ref_kl + λ_aux·roma_aux_loss + λ_inv·roma_penalty_worst",
    "pg_loss": "agg_t −min(ρA, clip(ρ)A) on the clean image; 0 when main is None",
    "pg_clipfrac_higher": "share of counted tokens with A > 0 whose ratio is clipped above",
    "pg_clipfrac_lower": "share of counted tokens with A < 0 whose ratio is clipped below",
    "ppo_kl": "mean over counted tokens of old_logp − logp, nats",
    "ref_kl": "agg_t expm1(ref − logp) − (ref − logp), nats; 0 when ref_coef is 0",
    "roma_penalty_worst": "L_inv, the penalty as it enters the loss, before λ_inv, nats",
    "roma_penalty_mean": "Σ_i mean_k D_i^k / total_sequences, right rollouts and wrong, nats",
    "roma_aux_loss": "L_aux, before λ_aux; 0 without aux_view",
    "roma_aux_clipfrac": "share of counted tokens whose auxiliary ratio is clipped, either side",
}
"""Every metric of the loss with its formula; shares and means divide by the global counts, so
shards add up."""


@dataclass(frozen=True)
class PackedBatch:
    """The counted completion tokens of B sequences, laid end to end; masked ones are gone.

    Float tensors share one dtype (fp32; float64 in tests) and one device. N = Σ lengths; or, for
    back end "triton", N ≥ Σ lengths: how many tokens are counted may be known to the device alone,
    and what stands beyond them is not looked at.
    """

    logp: Tensor  # [N], clean image
    view_logp: Tensor  # [K, N]
    old_logp: Tensor  # [N]
    ref_logp: Tensor | None  # [N]
    view_old_logp: Tensor | None  # [N], old policy on the sampled view; None: old_logp serves
    advantages: Tensor  # [N]
    sequence: Tensor  # [N] int64, not decreasing: the token's sequence
    lengths: Tensor  # [B] int64, tokens per sequence, 0 allowed
    correct: Tensor  # [B] bool
    aux_view: Tensor | None  # [B] int64
    total_sequences: Tensor  # 0-dim, over all shards, as are the next two
    total_tokens: Tensor
    total_correct: Tensor


def divisors(batch: PackedBatch, config: RomaConfig) -> tuple[Tensor, Tensor]:
    """Divisors, all at least 1, of a sequence's penalty (0-dim) and of its token losses ([B])."""
    sequences = batch.total_sequences if config.penalty_over == "all" else batch.total_correct
    if config.aggregation == "grpo":
        by_tokens = batch.total_sequences.clamp(min=1) * batch.lengths.clamp(min=1)
    elif config.aggregation == "dapo":
        by_tokens = batch.total_tokens.clamp(min=1).repeat(len(batch.lengths))
    else:
        assert config.max_length is not None  # RomaConfig's own check
        by_tokens = batch.total_sequences.clamp(min=1) * config.max_length
        by_tokens = by_tokens.repeat(len(batch.lengths))
    return sequences.clamp(min=1), by_tokens.to(batch.logp.dtype)


def sequence_sums(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """Sums [..., N] over each sequence to [..., B], in a fixed order of additions."""
    if not len(batch.lengths):
        return tokens.new_zeros((*tokens.shape[:-1], 0))
    sums = torch.segment_reduce(
        tokens.movedim(-1, 0).contiguous(), "sum", lengths=batch.lengths, axis=0, initial=0
    )
    return sums.movedim(0, -1)


def first_view(batch: PackedBatch, config: RomaConfig) -> Tensor:
    """View 0 everywhere, in the shape of the worst views: what K = 0 has to say of them."""
    if config.worst_over == "batch":
        return batch.lengths.new_zeros(())
    return torch.zeros_like(batch.sequence if config.worst_over == "token" else batch.lengths)
