r"""Rewards of `<think> … </think> … \boxed{answer}` that differ in how two answers are compared."""

import importlib.util
import re
from collections.abc import Sequence

from roma.rewards.boxed import (
    Reading,
    RewardInput,
    check_inputs,
    read_response,
    true_answer,
    weighted,
)
from roma.rewards.marked import Failed, Score
from roma.rewards.math import same_answer
from roma.rewards.process import ProcessReward
from roma_kernels.errors import fail

# math-verify reads a word as a product of its letters: to it, "last" is "salt".
_WORDS = re.compile(r"[^\W\d_]{2,}(?:\W+[^\W\d_]{2,})*")


def exact_score(
    reward_inputs: Sequence[RewardInput], *, format_weight: float = 0.1, strict_end: bool = True
) -> list[dict[str, float]]:
    r"""Scores responses whose answer must be the ground truth, letter by letter.

    The answer is the content of the last `\boxed{…}`, or without one all that stands behind the
    reasoning; blanks around it do not count. Parts, options and errors are those of
    `compute_score`; strict_end requires of a response without a box that it is finished.

    Example:
        >>> exact_score([{"response": "B", "ground_truth": "B"}], format_weight=0.0)
        [{'overall': 1.0, 'format': 0.0, 'accuracy': 1.0}]
    """
    check_inputs(reward_inputs, format_weight)
    scores = []
    for item in reward_inputs:
        found = read_response(item)
        answer = found.rest if found.box is None else found.box
        right = (found.ended or not strict_end) and answer == true_answer(item)
        scores.append(
            weighted(accuracy=right, well_formed=found.well_formed, format_weight=format_weight)
        )
    return scores


class MathReward:
    r"""Scores boxed answers by mathematical equivalence: \frac{1}{\sqrt 2} is \frac{\sqrt 2}{2}.

    As `compute_score`, and an answer that `same_answer` does not take for the ground truth is
    compared by math-verify too, unless one of the two is words alone. Equal pairs are compared
    once. math-verify runs in a process of its own: its own time limit needs signals, which only a
    main thread gets, and would call an answer wrong that could not be compared in time.

    Args:
        format_weight, strict_end: as those of `compute_score`.
        timeout_s: of a comparison, seconds.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(
        self, *, format_weight: float = 0.1, strict_end: bool = True, timeout_s: float = 10.0
    ) -> None:
        """Starts the process."""
        self.format_weight, self.strict_end = format_weight, strict_end
        if importlib.util.find_spec("math_verify") is None:
            expected, remedy = "the package math-verify", "pip install math-verify"
            fail("reward 'math'", expected, "that it is not installed", remedy)
        spec = "roma.rewards.equivalence:compare"
        self._compare = ProcessReward(spec, timeout_s=timeout_s, rowwise=True)

    def __call__(self, reward_inputs: Sequence[RewardInput]) -> list[Score | Failed]:
        """The scores; of an answer that could not be compared, why."""
        check_inputs(reward_inputs, self.format_weight)
        readings = [read_response(item) for item in reward_inputs]
        truths = [true_answer(item) for item in reward_inputs]
        right: dict[tuple[str, str], bool | Failed] = {}
        for found, truth in zip(readings, truths, strict=True):
            if found.box is not None and (found.ended or not self.strict_end):
                right[found.box, truth] = same_answer(found.box, truth)
        open_pairs = [pair for pair, same in right.items() if not same and _is_math(*pair)]
        asked = [{"response": answer, "ground_truth": truth} for answer, truth in open_pairs]
        for pair, score in zip(open_pairs, self._compare(asked), strict=True):
            right[pair] = score if isinstance(score, Failed) else score["accuracy"] == 1
        return [
            self._score(found, right.get((found.box or "", truth), False))
            for found, truth in zip(readings, truths, strict=True)
        ]

    def close(self) -> None:
        """Ends the process; a later call starts one anew."""
        self._compare.close()

    def _score(self, found: Reading, right: bool | Failed) -> Score | Failed:
        counts = found.box is not None and (found.ended or not self.strict_end)
        if counts and isinstance(right, Failed):
            return right
        return weighted(
            accuracy=counts and right is True,
            well_formed=found.well_formed,
            format_weight=self.format_weight,
        )


def _is_math(answer: str, truth: str) -> bool:
    return not any(_WORDS.fullmatch(text.strip()) for text in (answer, truth))
