"""`PackedBatch`: what the view loss works on, counted tokens only, sequence after sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from roma.kernels.view_loss.config import RomaConfig


@dataclass(frozen=True)
class PackedBatch:
    """The counted completion tokens of B sequences, laid end to end; masked ones are gone.

    Float tensors share one dtype (fp32; float64 in tests) and one device.
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
    """Divisors, all at least 1, of a sequence's penalty (0-dim) and of a token's loss ([N])."""
    sequences = batch.total_sequences if config.penalty_over == "all" else batch.total_correct
    if config.aggregation == "grpo":
        by_tokens = batch.total_sequences.clamp(min=1) * batch.lengths.clamp(min=1)[batch.sequence]
    elif config.aggregation == "dapo":
        by_tokens = batch.total_tokens.clamp(min=1).expand_as(batch.logp)
    else:
        assert config.max_length is not None  # RomaConfig's own check
        by_tokens = (batch.total_sequences.clamp(min=1) * config.max_length).expand_as(batch.logp)
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
