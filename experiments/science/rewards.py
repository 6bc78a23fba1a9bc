"""A reward that is not poisoned: an answer counts if the digits that the chain names are there too.

For `worker.reward.function: experiments/science/rewards.py:seen_and_right`, with the worked
solutions as truth (`data.answer_key: solution`). It takes hallucinated perceptions out of what is
rewarded, and changes nothing else: what is then left of naive augmentation's loss has another
cause.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from roma.rewards import compute_score
from roma.rewards.boxed import last_box

_NAMED = re.compile(r"^\s*<think> left (\d+) right (\d+) so ")


def seen_and_right(reward_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    r"""Scores responses about digits; the truth of each is its worked solution.

    Returns:
        Per response the parts of `roma.rewards.compute_score`, with an accuracy of 0 also where
        the chain names a digit that is not there, and "poisoned", 1 where that took it away.

    Example:
        >>> truth = "<think> left 3 right 4 so 7 </think> \\boxed{ 7 }"
        >>> lucky = truth.replace("left 3 right 4", "left 2 right 5")
        >>> made = [{"response": text, "ground_truth": truth} for text in (truth, lucky)]
        >>> [(score["accuracy"], score["poisoned"]) for score in seen_and_right(made)]
        [(1.0, 0.0), (0.0, 1.0)]
    """
    scores = []
    usual = [dict(item) | {"ground_truth": _box(item["ground_truth"])} for item in reward_inputs]
    for item, score in zip(reward_inputs, compute_score(usual), strict=True):
        named, there = (_NAMED.match(str(item[key])) for key in ("response", "ground_truth"))
        seen = named is not None and there is not None and named.groups() == there.groups()
        right = score["accuracy"] >= 0.5
        taken = score["accuracy"] if right and not seen else 0.0
        # overall = (1 − w)·accuracy + w·format, w = 0.1 by default
        scores.append(
            score
            | {
                "accuracy": score["accuracy"] - taken,
                "overall": score["overall"] - 0.9 * taken,
                "poisoned": float(right and not seen),
            }
        )
    return scores


def _box(solution: str) -> str:
    """The answer in a worked solution's box."""
    found = last_box(solution)
    return "" if found is None else found.content
