"""Rewards that may fail: a rollout whose reward does is marked, and the others keep theirs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roma.rewards.boxed import RewardInput


@dataclass(frozen=True)
class Failed:
    """The reward of a rollout could not be had.

    Attributes:
        reason: one line.
    """

    reason: str


Score = Mapping[str, float]
"""The parts of a reward: "overall", "format", "accuracy", and whatever else is to be logged."""

MarkedReward = Callable[[Sequence[RewardInput]], Sequence[Score | Failed]]
"""Scores responses, in their order. Of a response that it could not score it returns why."""


class RewardError(ValueError):
    """The reward of a rollout failed, and `worker.reward.on_error` is "stop"."""


def stopping(reward: MarkedReward) -> MarkedReward:
    """A reward that raises where the given one would mark.

    Raises:
        RewardError: when it is called, at the first response that could not be scored.
    """

    def checked(reward_inputs: Sequence[RewardInput]) -> Sequence[Score | Failed]:
        scores = reward(reward_inputs)
        for item, score in zip(reward_inputs, scores, strict=True):
            if isinstance(score, Failed):
                raise RewardError(
                    f"reward of row {item.get('id', '?')}: expected a score, got none: "
                    f"{score.reason}; correct the reward, or mark such rollouts with "
                    "worker.reward.on_error=mark"
                )
        return scores

    return checked
