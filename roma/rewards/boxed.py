r"""The built-in reward of `<think> … </think> … \boxed{answer}`, under EasyR1's signature."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from roma.rewards.math import same_answer
from roma_kernels.errors import fail

RewardInput = Mapping[str, Any]
"""A response to score: "response", "ground_truth", "response_length", "finished"; from the trainer
also "problem" (the question) and "id" (of the data's row)."""

THINK = ("<think>", "</think>")

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} match as pairs, which do not nest


class Box(NamedTuple):
    r"""A `\boxed{…}` in a text: its content, stripped, and where it starts and ends."""

    content: str
    start: int
    end: int


def last_box(text: str) -> Box | None:
    r"""Finds the last `\boxed{…}`, braces balanced; None if there is none or it is not closed.

    Example:
        >>> last_box(r"\boxed{1} or \boxed{\frac{1}{2}}").content
        '\\frac{1}{2}'
    """
    openings = list(re.finditer(r"\\boxed\s*\{", text))
    if not openings:
        return None
    opening = openings[-1]
    depth = 1
    for brace in _BRACE.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            inside = text[opening.end() : brace.start()]
            return Box(inside.strip(), opening.start(), brace.end())
    return None


class Reading(NamedTuple):
    """What a response says, and whether it has the form that was asked for."""

    box: str | None  # content of the last box
    rest: str  # what stands behind the reasoning, stripped; of a response without tags all of it
    well_formed: bool  # `<think> … </think> … \boxed{…}`, each tag once, and finished
    ended: bool  # finished, and nothing but blanks behind the last box, if there is one


def read_response(item: RewardInput, *, think: Sequence[str] | None = THINK) -> Reading:
    r"""Reads a response that reasons between tags and ends in a box.

    Args:
        item: "response", and optionally "finished" (default True).
        think: the two tags, the first one empty if the prompt already holds it; None: no tags.

    Raises:
        ValueError: `think` is no such pair.

    Example:
        >>> read_response({"response": r"<think> 3 + 5 </think> so \boxed{8}"}).box
        '8'
    """
    before_box = _before_box(tuple(think) if think is not None else None)
    response = str(item["response"])
    finished = bool(item.get("finished", True))
    rest = response.rpartition(think[1])[2].strip() if think else response.strip()
    box = last_box(response)
    if box is None:
        return Reading(None, rest, False, finished)
    ended = finished and not response[box.end :].strip()
    well_formed = ended and bool(before_box.fullmatch(response, 0, box.start))
    return Reading(box.content, rest, well_formed, ended)


def true_answer(item: RewardInput) -> str:
    r"""The ground truth, out of its box if it is all in one, as ViRL39K writes it.

    Example:
        >>> true_answer({"ground_truth": r"\boxed{5^\circ}"})
        '5^\\circ'
    """
    truth = str(item["ground_truth"]).strip()
    box = last_box(truth)
    return box.content if box and (box.start, box.end) == (0, len(truth)) else truth


def weighted(*, accuracy: bool, well_formed: bool, format_weight: float) -> dict[str, float]:
    """The parts of a reward: overall = (1 - w)·accuracy + w·format, w = format_weight."""
    overall = (1 - format_weight) * accuracy + format_weight * well_formed
    return {"overall": overall, "format": float(well_formed), "accuracy": float(accuracy)}


def check_inputs(reward_inputs: Sequence[RewardInput], format_weight: float) -> None:
    """Checks what all rewards of this room read.

    Raises:
        ValueError: format_weight out of range, or a key is missing.
    """
    if not 0 <= format_weight <= 1:
        fail("format_weight", "a number in 0..1", str(format_weight), "it is the format's share")
    for index, item in enumerate(reward_inputs):
        for key in ("response", "ground_truth"):
            if key not in item:
                got = f"the keys {sorted(item)}"
                fail(f"reward_inputs[{index}]", f"the key '{key}'", got, "add it")


def compute_score(
    reward_inputs: Sequence[RewardInput],
    *,
    format_weight: float = 0.1,
    strict_end: bool = True,
    think: tuple[str, str] | None = THINK,
) -> list[dict[str, float]]:
    r"""Scores responses that reason between tags and end in a box.

        overall = (1 − w)·accuracy + w·format,   w = format_weight          (EasyR1's weighting)

    accuracy is 1 if the content of the last `\boxed{…}` equals the ground truth (`same_answer`),
    which may stand in a box too, else 0. format is 1 if the response is finished and is
    `<think> … </think> … \boxed{…}`, each tag once, with nothing but blanks around it; else 0.

    Args:
        reward_inputs: per response a mapping with "response" (text), "ground_truth" and optionally
            "finished" (default True): whether the response ended with the end token.
            "response_length" is not read; other reward functions may use it.
        format_weight: w in 0..1.
        strict_end: accuracy too requires the end right after the box. Without it a run learns to
            add text after a right answer, which costs only the format's small share. False suits a
            model that writes `$\boxed{5}$.`
        think: the two tags, the first one empty if the prompt already holds it; None: a box without
            tags is well formed.

    Returns:
        Per response {"overall", "format", "accuracy"}, each in 0..1.

    Raises:
        ValueError: format_weight out of range, or a key is missing.

    Example:
        >>> response = r"<think> 3 + 5 </think> \boxed{8}"
        >>> compute_score([{"response": response, "response_length": 9, "ground_truth": "8"}])
        [{'overall': 1.0, 'format': 1.0, 'accuracy': 1.0}]
    """
    check_inputs(reward_inputs, format_weight)
    scores = []
    for item in reward_inputs:
        found = read_response(item, think=think)
        counts = found.box is not None and (found.ended or not strict_end)
        right = counts and same_answer(found.box or "", true_answer(item))
        scores.append(
            weighted(accuracy=right, well_formed=found.well_formed, format_weight=format_weight)
        )
    return scores


@lru_cache
def _before_box(think: tuple[str, ...] | None) -> re.Pattern[str]:
    """What the format requires before the box."""
    if think is None:
        return re.compile(r".*", re.DOTALL)
    if len(think) != 2 or not think[1]:
        fail("think", "(opening tag, closing tag)", repr(think), "only the first may be empty")
    opening, closing = map(re.escape, think)
    tags = "|".join(tag for tag in (opening, closing) if tag)
    text = rf"(?:(?!{tags}).)*"
    return re.compile(rf"\s*{opening}{text}{closing}{text}", re.DOTALL)
