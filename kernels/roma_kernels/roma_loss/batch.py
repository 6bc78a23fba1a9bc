"""`Layout` and `Batch`: the counted tokens of B sequences laid end to end, and their constants."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from roma_kernels.roma_loss.config import RomaConfig

METRICS = {
    "loss": "L = pg_loss + β·ref_kl − η·entropy + λ_aux·roma_aux_loss + λ_inv·roma_penalty_worst",
    "pg_loss": "agg_t of main's token loss on the clean image, as −min(ρA, clip(ρ)A); 0 when main "
    "is None",
    "pg_clipfrac_higher": "share of counted tokens with A > 0 whose ratio is clipped above (cispo: "
    "capped); 0 for sapo and vespo",
    "pg_clipfrac_lower": "share of counted tokens with A < 0 whose ratio is clipped below; grpo's "
    "alone",
    "ppo_kl": "mean over counted tokens of old_logp − logp, nats",
    "ref_kl": "agg_t expm1(ref − logp) − (ref − logp), times ρ if ref_unbiased, nats; 0 when "
    "ref_coef is 0",
    "roma_penalty_worst": "L_inv, the penalty as it enters the loss, before λ_inv, nats",
    "roma_penalty_mean": "Σ_i m_i mean_k D_i^k / total_sequences, right rollouts alone, nats",
    "roma_aux_loss": "L_aux, before λ_aux; 0 without aux_view",
    "roma_aux_clipfrac": "share of counted tokens whose auxiliary ratio is clipped, either side",
    "entropy": "mean over counted tokens of H = lse − Σ p·z on the clean image, nats; 0 when "
    "entropy_coef is 0",
    "roma_gated": "right (view, rollout) pairs with D_i^k > gate_bound / (K·total_sequences)",
}
"""Every metric of the loss with its formula; shares and means divide by the global counts, so
shards add up."""


@dataclass(frozen=True)
class Layout:
    """Where the counted tokens stand in [B, T] or [N], flattened to M positions.

    Tensors over tokens are [M], whatever the mask: the N counted tokens come first, in order, and
    what follows has no meaning. So no shape depends on a value, torch.compile and CUDA graphs can
    follow, and a kernel computes the first N. Where reading N costs nothing, M is N.
    """

    shape: torch.Size  # (B, T) or (M,)
    letters: str  # "[B, T]" or "[N]", as the messages write it
    index: Tensor  # [M] int64: position of each counted token
    sequence: Tensor  # [M] int64: sequence of each counted token
    lengths: Tensor  # [B] int64: counted tokens of each sequence
    num_tokens: Tensor  # 0-dim int64: N
    valid: Tensor  # [M] bool: the first N

    def pack(self, tokens: Tensor) -> Tensor:
        """[..., B, T] or [..., N] to [..., M]."""
        lead = tokens.shape[: tokens.ndim - len(self.shape)]
        return tokens.reshape(*lead, self.shape.numel()).index_select(-1, self.index)

    def unpack(self, tokens: Tensor, fill: float) -> Tensor:
        """[..., M] back to [..., B, T] or [..., N]."""
        lead, size = tokens.shape[:-1], self.shape.numel()
        # One position more, for what has no meaning.
        positions = self.index.where(self.valid, size)
        flat = tokens.new_full((*lead, size + 1), fill).index_copy(-1, positions, tokens)
        return flat[..., :size].reshape(*lead, *self.shape)

    def trimmed(self) -> "Layout":
        """The counted tokens alone; reads their number from the device."""
        n, by_token = int(self.num_tokens), ("index", "sequence", "valid")
        return replace(self, **{name: getattr(self, name)[:n] for name in by_token})


@dataclass(frozen=True, kw_only=True)
class Constants:
    """All that the loss depends on and that is not differentiated; floats share one dtype."""

    old_logp: Tensor | None  # [M]; None: logp itself, detached
    ref_logp: Tensor | None  # [M]
    view_old_logp: Tensor | None  # [M], old policy on the sampled view; None: old_logp is used
    rollout_weight: Tensor | None  # [M], ≥ 0; None: 1
    advantages: Tensor  # [M]
    sequence: Tensor  # [M] int64, not decreasing over the first N
    lengths: Tensor  # [B] int64, N = Σ lengths, 0 allowed
    correct: Tensor  # [B] bool
    aux_view: Tensor | None  # [B] int64
    total_sequences: Tensor  # 0-dim, over all shards, as are the next two
    total_tokens: Tensor
    total_correct: Tensor
    lambda_inv: Tensor  # 0-dim: tensors, so that one that changes each step recompiles nothing
    lambda_aux: Tensor
    gate_bound: Tensor | None  # 0-dim nats, ∞ where gate_tau is given alone; None: no gate

    def tensors(self) -> list[Tensor | None]:
        """The fields in order, as an operator takes them."""
        return [getattr(self, name) for name in _CONSTANTS]


_CONSTANTS = tuple(Constants.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Batch(Constants):
    """Log-probs of the tokens on K+1 images, and the constants."""

    logp: Tensor  # [M], clean image
    view_logp: Tensor  # [K, M]

    @classmethod
    def of(cls, logp: Tensor, view_logp: Tensor, constants: list[Tensor | None]) -> "Batch":
        """A batch from log-probs and `Constants.tensors`."""
        named = dict(zip(_CONSTANTS, constants, strict=True))
        return cls(logp=logp, view_logp=view_logp, **named)  # type: ignore[arg-type]  # in the order of tensors()

    @property
    def old(self) -> Tensor:
        """[M]: log-probs of the policy that sampled."""
        return self.logp.detach() if self.old_logp is None else self.old_logp

    @property
    def view_old(self) -> Tensor:
        """[M]: denominators of the auxiliary ratio."""
        return self.old if self.view_old_logp is None else self.view_old_logp

    def trimmed(self) -> "Batch":
        """The N counted tokens alone; reads N from the device."""
        n = int(self.lengths.sum())
        logps = ("logp", "old_logp", "ref_logp", "view_old_logp")
        by_token = (*logps, "rollout_weight", "advantages", "sequence")
        cut = {name: x[:n] for name in by_token if (x := getattr(self, name)) is not None}
        return replace(self, **cut, view_logp=self.view_logp[:, :n])


def divisors(batch: Batch, config: RomaConfig) -> tuple[Tensor, Tensor]:
    """Divisors, all positive, of a sequence's penalty (0-dim) and of its token losses ([B])."""
    sequences = batch.total_sequences if config.penalty_over == "all" else batch.total_correct
    total, lengths = batch.total_sequences.clamp(min=1), batch.lengths
    if config.aggregation == "grpo":
        return sequences.clamp(min=1), (total * lengths.clamp(min=1)).to(batch.logp.dtype)
    if config.aggregation == "dapo":
        of_tokens = batch.total_tokens.clamp(min=1)
    elif config.aggregation == "bnpo":  # the call's share of the sequences, over its own tokens
        of_tokens = total * lengths.sum().clamp(min=1) / max(len(lengths), 1)
    elif config.aggregation == "luspo":
        of_tokens = total
    else:
        assert config.max_length is not None  # RomaConfig's own check
        of_tokens = total * config.max_length
    return sequences.clamp(min=1), of_tokens.repeat(len(lengths)).to(batch.logp.dtype)


def first_view(constants: Constants, config: RomaConfig) -> Tensor:
    """View 0 everywhere, in the shape of the worst views: what K = 0 returns for them."""
    if config.worst_over == "batch":
        return constants.lengths.new_zeros(())
    like = constants.sequence if config.worst_over == "token" else constants.lengths
    return like.new_zeros(like.shape)
