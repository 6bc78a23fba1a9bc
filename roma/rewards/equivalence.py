"""Mathematical equivalence by math-verify, for a process of its own (`MathReward` starts it)."""

import logging
from collections.abc import Sequence

from math_verify import parse, verify

from roma.rewards.boxed import RewardInput

# It warns that without its own time limit one must be kept by the caller, who does.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def compare(rows: Sequence[RewardInput]) -> list[dict[str, float]]:
    """Whether each "response" equals its "ground_truth", both without box: accuracy 1 or 0.

    Example:
        >>> compare([{"response": r"(x + 1)^2", "ground_truth": r"x^2 + 2x + 1"}])[0]["accuracy"]
        1.0
    """
    found = [_same(str(row["response"]), str(row["ground_truth"])) for row in rows]
    return [{"overall": same, "format": 0.0, "accuracy": same} for same in found]


def _same(answer: str, truth: str) -> float:
    left, right = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer))
    return float(verify(left, right, timeout_seconds=None))
