"""Advantages by group, where some rollouts have no reward."""

import torch
from torch import Tensor

from roma.advantages import AdvantageInputs, Estimator
from roma.advantages.base import OptionalInput
from roma.train.refine.sampled import Metrics, Sampled
from roma.train.scoring import Scores


class ByGroup:
    """A pure estimator on all rollouts of this rank, whose groups are whole.

    Args:
        estimator: of `roma.advantages.ESTIMATORS`, or another.
    """

    def __init__(self, estimator: Estimator) -> None:
        """Keeps it."""
        self.estimator = estimator

    @property
    def needs(self) -> frozenset[OptionalInput]:
        """The estimator's."""
        return self.estimator.needs

    def __call__(self, sampled: Sampled, scores: Scores | None) -> tuple[Tensor, Metrics]:
        """Its advantages; 0 where a reward failed."""
        scored = {name: getattr(scores, name) for name in self.needs}
        mask, overall = sampled.rollouts.mask, sampled.rewards["overall"]
        inputs = AdvantageInputs(overall, sampled.group, mask, **scored)
        return advantages_of(self.estimator, inputs, sampled.failed), {}


def advantages_of(estimator: Estimator, inputs: AdvantageInputs, failed: Tensor) -> Tensor:
    """Advantages where some rollouts have no reward: theirs are 0, the others' are as if alone.

    The estimator is given the other rollouts only, so that no statistic of a group holds a failed
    one, whichever the estimator. A rollout whose group it alone is left of has nothing to be
    compared with, and gets 0 too.

    Args:
        estimator: any.
        inputs: of B rollouts.
        failed: [B] bool.

    Returns:
        [B] or [B, T], as the estimator returns.
    """
    if not failed.any():
        return estimator(inputs)
    ids, member = inputs.group.unique(return_inverse=True)
    left = (~failed).new_zeros(len(ids), dtype=torch.int64).index_add(0, member, (~failed).long())
    lost = torch.zeros_like(left).index_add(0, member, failed.long())
    taken = ~failed & ~((left == 1) & (lost > 0))[member]
    if not taken.any():
        return torch.zeros_like(inputs.rewards)
    optional = {name: getattr(inputs, name) for name in ("logp", "entropy", "hidden")}
    kept = {name: value[taken] for name, value in optional.items() if value is not None}
    found = estimator(
        AdvantageInputs(inputs.rewards[taken], inputs.group[taken], inputs.mask[taken], **kept)
    )
    advantages = found.new_zeros(len(failed), *found.shape[1:])
    advantages[taken] = found
    return advantages
