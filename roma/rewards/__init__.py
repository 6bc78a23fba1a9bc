"""Rewards: boxed answers and their format, or a function of your own (`file.py:compute_score`)."""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.rewards.boxed import RewardInput, compute_score, last_box
from roma.rewards.loader import RewardFunction, load_reward
from roma.rewards.math import same_answer

__all__ = [
    "RewardFunction",
    "RewardInput",
    "compute_score",
    "last_box",
    "load_reward",
    "same_answer",
]
