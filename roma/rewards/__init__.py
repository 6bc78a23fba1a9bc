"""Rewards: boxed answers and their format, a judge, or a function of your own.

`make_reward` builds the reward of a run from its options (docs/REWARDS.md).
"""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.rewards.boxed import RewardInput, compute_score, last_box
from roma.rewards.graded import MathReward, exact_score
from roma.rewards.judge import JudgeReward
from roma.rewards.loader import RewardFunction, load_reward
from roma.rewards.make import make_reward
from roma.rewards.marked import Failed, MarkedReward, RewardError, Score
from roma.rewards.math import same_answer
from roma.rewards.process import ProcessReward

__all__ = [
    "Failed",
    "JudgeReward",
    "MarkedReward",
    "MathReward",
    "ProcessReward",
    "RewardError",
    "RewardFunction",
    "RewardInput",
    "Score",
    "compute_score",
    "exact_score",
    "last_box",
    "load_reward",
    "make_reward",
    "same_answer",
]
