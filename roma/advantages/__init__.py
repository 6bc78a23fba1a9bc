"""Advantages: from the rewards of a rollout batch to one number per sequence."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from roma.advantages.group import dr_grpo, grpo, rloo

# The value of `algorithm.adv_estimator` -> (rewards [B], groups [B]) -> advantages [B].
ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
)

__all__ = ["ESTIMATORS", "dr_grpo", "grpo", "rloo"]
