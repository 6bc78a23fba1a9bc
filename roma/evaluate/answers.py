"""Answers of a model, and which of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma.data import Example
from roma.rewards import RewardFunction


@dataclass(frozen=True)
class Answer:
    """What a model said: decoded text, its length in tokens, and whether an end token closed it."""

    text: str
    length: int
    finished: bool = True


def correct_answers(
    answers: Sequence[Answer], examples: Sequence[Example], score: RewardFunction
) -> NDArray[np.uint8]:
    """[n]: 1 where the reward function calls the answer accurate."""
    rows: list[dict[str, Any]] = [
        {
            "response": answer.text,
            "response_length": answer.length,
            "ground_truth": example.answer,
            "finished": answer.finished,
        }
        for answer, example in zip(answers, examples, strict=True)
    ]
    return np.array([found["accuracy"] >= 0.5 for found in score(rows)], dtype=np.uint8)
