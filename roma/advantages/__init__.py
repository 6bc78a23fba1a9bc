"""Advantages: how much better a rollout is than its prompt's others.

The estimators are pure functions on tensors. A trainer takes them from `ESTIMATORS`, where each one
reads the same `AdvantageInputs` and says which optional parts of them it needs.

`mssr` is an estimator with a memory, for one rollout per prompt. `srpo` and `vgpo` refine the
advantages of any estimator, token by token. `noisy_rollout` is a schedule.
"""

from collections.abc import Mapping
from types import MappingProxyType

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.advantages import mssr, noisy_rollout, srpo, vgpo
from roma.advantages.base import AdvantageInputs, Estimator, of_rewards
from roma.advantages.group import dr_grpo, grpo, rloo

ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {"grpo": of_rewards(grpo), "dr_grpo": of_rewards(dr_grpo), "rloo": of_rewards(rloo)}
)
"""By the value of `algorithm.adv_estimator`; "mssr" has a `mssr.BetaTracker` of each run's own."""

__all__ = [
    "ESTIMATORS",
    "AdvantageInputs",
    "Estimator",
    "dr_grpo",
    "grpo",
    "mssr",
    "noisy_rollout",
    "of_rewards",
    "rloo",
    "srpo",
    "vgpo",
]
