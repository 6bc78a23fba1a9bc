"""What an advantage estimator takes, and how a trainer learns what to prepare for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from roma_kernels.errors import fail


@dataclass(frozen=True)
class AdvantageInputs:
    """All rollouts of one batch, B of them, never a micro-batch: an estimator compares groups.

    The last three cost a pass through the model; a trainer computes those that `Estimator.needs`
    names, under the policy that sampled and on the images that it saw.
    """

    rewards: Tensor  # [B] fp32
    group: Tensor  # [B] int64, the prompt of each rollout
    mask: Tensor  # [B, T] bool, True = counts
    logp: Tensor | None = None  # [B, T] nats, of the sampled tokens
    entropy: Tensor | None = None  # [B, T] nats
    hidden: Tensor | None = None  # [B, T, D], after the last norm, where a token is predicted


OptionalInput = Literal["logp", "entropy", "hidden"]


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator: a function of the inputs, and the optional ones that it reads.

    Args:
        compute: from the inputs to advantages, [B] or [B, T].
        needs: the optional inputs that it reads.
    """

    compute: Callable[[AdvantageInputs], Tensor]
    needs: frozenset[OptionalInput] = frozenset()

    def __call__(self, inputs: AdvantageInputs) -> Tensor:
        """The advantages.

        Raises:
            ValueError: an input that the estimator needs is None.
        """
        for name in sorted(self.needs):
            if getattr(inputs, name) is None:
                fail(f"AdvantageInputs.{name}", "a tensor", "None", "this estimator reads it")
        return self.compute(inputs)


def of_rewards(function: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """The estimator of a pure function (rewards [B], group [B]) -> advantages [B]."""
    return Estimator(lambda inputs: function(inputs.rewards, inputs.group))
