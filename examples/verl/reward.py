"""A reward function for verl: the answer in a box, with its accuracy beside the score.

The score may be a mix with format; ROMA reads "acc" alone, and refuses a function that gives none.
"""

from typing import Any

from roma.rewards import compute_score as boxed


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> dict[str, float]:
    """Score, accuracy and format of one completion, in verl's names."""
    (found,) = boxed([{"response": solution_str, "ground_truth": ground_truth}])
    return {"score": found["overall"], "acc": found["accuracy"], "format": found["format"]}
