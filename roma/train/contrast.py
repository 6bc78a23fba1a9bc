"""Terms that compare the clean image with views and have a gradient on the clean side alone.

    L = L_main + Σ_v coef_v · agg_t min(k3(δ_t^v), cap)        δ = sg(a_t^v) − c_t
    k3(δ) = expm1(δ) − δ                                       ∂k3/∂c = −expm1(δ)

c: log-prob of a sampled token on the clean image, a^v: the same token on view v (docs/MATH.md
section 5). Tokens come from the clean policy, so that E[k3] = KL(clean ‖ view). All rollouts take
part, right or wrong, and agg is the clean objective's aggregation. δ is clamped like every
log-ratio; neither clamp nor cap lets a gradient through.

    PAPO (arXiv 2507.06448)    one view, masked: coef −γ, so that the policy moves away from it
    DVRP (arXiv 2601.06801)    a noised view: coef > 0; a masked one: coef < 0

This is the mirror of ROMA's penalty, whose gradient is on the view's side: here a view is run
without a graph, which costs a forward pass of each and no backward.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from roma.train.batch import Totals
from roma.train.config.sections import AlgorithmConfig
from roma_kernels.errors import fail
from roma_kernels.roma_loss.config import RomaConfig


class Term(NamedTuple):
    """One divergence in the loss."""

    name: str
    view: int
    coef: float  # > 0: towards the view; < 0: away from it


@dataclass(frozen=True)
class Contrast:
    """The terms of a method.

    Attributes:
        terms: one for each view.
        cap: highest k3 of a token, nats.
        probability: chance of a patch of the masked view to be black.
    """

    terms: tuple[Term, ...]
    cap: float
    probability: float

    @classmethod
    def of(cls, algorithm: AlgorithmConfig) -> "Contrast | None":
        """That of `algorithm.view_mode`; None where the mode has none."""
        if algorithm.view_mode == "papo":
            papo = algorithm.papo
            return cls((Term("masked", 0, -papo.coef),), papo.cap, papo.probability)
        if algorithm.view_mode == "dvrp":
            dvrp = algorithm.dvrp
            terms = Term("noised", 0, dvrp.noised_coef), Term("masked", 1, -dvrp.masked_coef)
            return cls(terms, dvrp.cap, dvrp.probability)
        return None

    def __call__(
        self,
        logp: Tensor,
        view_logp: Tensor,
        lengths: Tensor,
        totals: Totals,
        config: RomaConfig,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms' sum, and what is logged of them.

        Args:
            logp: [N] nats, clean image, rollouts end to end; differentiable.
            view_logp: [K, N] nats, the same tokens on each view; no gradient.
            lengths: [B] int64, tokens of each rollout; they add up to N.
            totals: of all micro-batches and ranks, whose terms then add up.
            config: gives aggregation, max_length and log_ratio_clamp.

        Returns:
            A 0-dim tensor to add to the loss; and `contrast_<name>` of each term, agg_t k3 before
            its coefficient, nats, detached.
        """
        weight = token_weight(lengths, totals, config)
        loss, metrics = logp.new_zeros(()), dict[str, Tensor]()
        for term in self.terms:
            k3, slope = self._k3(logp.detach(), view_logp[term.view], config.log_ratio_clamp)
            found = (weight * k3).sum().to(logp.dtype)
            metrics[f"contrast_{term.name}"] = found
            # Its value is that of `found`, its gradient by logp weight · slope.
            moved = (weight * slope).to(logp.dtype) * (logp - logp.detach())
            loss = loss + term.coef * (found + moved.sum())
        return loss, metrics

    def _k3(self, logp: Tensor, view_logp: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
        """k3 and its slope by logp, in float64: the difference cancels where views are alike."""
        gap = view_logp.double() - logp.double()
        growth = torch.expm1(gap.clamp(-clamp, clamp))
        k3 = growth - gap.clamp(-clamp, clamp)
        flat = (gap.abs() > clamp) | (k3 > self.cap)
        return k3.clamp(max=self.cap), torch.where(flat, 0.0, -growth)


def token_weight(lengths: Tensor, totals: Totals, config: RomaConfig) -> Tensor:
    """[N] float64: what a token of a rollout counts in the clean objective's aggregation.

    Raises:
        ValueError: "bnpo", whose divisor is no total.
    """
    if config.aggregation == "grpo":
        each = 1 / (totals.sequences * lengths.clamp(min=1).double())
    elif config.aggregation == "dapo":
        each = torch.full_like(lengths, 1 / max(totals.tokens, 1), dtype=torch.float64)
    elif config.aggregation == "dr_grpo":
        assert config.max_length is not None  # RomaConfig's own check
        each = torch.full_like(
            lengths, 1 / (totals.sequences * config.max_length), dtype=torch.float64
        )
    elif config.aggregation == "luspo":
        each = torch.full_like(lengths, 1 / totals.sequences, dtype=torch.float64)
    else:
        expected = "grpo, dapo, dr_grpo or luspo"
        fail("aggregation", expected, config.aggregation, "it is not a sum over micro-batches")
    return each.repeat_interleave(lengths)
