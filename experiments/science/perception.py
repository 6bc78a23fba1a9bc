"""What a chain claims to see, beside what is there: hallucinated perceptions.

A chain names the marks that it reads (digits, bars) before it computes. On an image on which
nothing can be read it must invent them. Two questions:

* **What does training reward?** Of rollouts sampled on degraded images as naive augmentation
  samples them, at temperature 1, the share of the *rewarded* ones that name a mark that is not
  there: `poisoned`. Rollouts on clean images, which ROMA learns from, are measured alike.
* **What does the trained model see?** Of greedy answers at a condition the share whose chain names
  a mark that is not there (`misread`), whose answer is not what follows from the marks it names
  (`unfaithful`), and the share of the commonest reading (`stock`): a policy that has learnt to
  guess says the same of many images.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma.data import Example
from roma.evaluate.result import CellResult
from roma.rewards import compute_score
from roma.rewards.boxed import read_response
from roma.views import Corruption, degrade_batch, sample, seed_for

Named = Callable[[str], tuple[int, ...] | None]
"""The marks that a chain names, from left to right; None: it names none."""

_DIGITS = re.compile(r"^\s*<think> left (\d+) right (\d+) so ")
QUESTIONS, ROLLOUTS = 400, 4
"""Training questions, and rollouts of each, that `poisoned` is measured on."""


def named_digits(text: str) -> tuple[int, ...] | None:
    r"""The two digits that a chain names.

    Example:
        >>> named_digits("<think> left 3 right 4 so 7 </think> \\boxed{ 7 }"), named_digits("so 7")
        ((3, 4), None)
    """
    found = _DIGITS.match(text)
    return None if found is None else tuple(int(part) for part in found.groups())


def follows(problem: str, named: Sequence[int]) -> int:
    """The answer to a question about digits, if these were the digits.

    Example:
        >>> follows("<image> sum ?", (3, 4)), follows("<image> larger ?", (3, 4))
        (7, 4)
    """
    return sum(named) if "sum" in problem.split() else max(named)


@dataclass(frozen=True)
class Readings:
    """What the answers to n questions claim to see.

    Attributes:
        misread: [n] 0 or 1, whether the chain names a mark that is not there, or none.
        unfaithful: [n] 0 or 1, whether the answer is not what follows from the marks it names.
        stock: [n] 0 or 1, whether the reading is the commonest of the n.
    """

    misread: NDArray[np.float64]
    unfaithful: NDArray[np.float64]
    stock: NDArray[np.float64]


def readings(
    found: CellResult, examples: Sequence[Example], named: Named = named_digits
) -> Readings:
    """Compares the chains of greedy answers with the worked solutions."""
    claims = [named(text) for text in found.texts]
    truth = [named(example.solution or "") for example in examples]
    boxes = [read_response({"response": text}).box for text in found.texts]
    misread = [claim != there for claim, there in zip(claims, truth, strict=True)]
    unfaithful = [
        claim is None or box is None or box.strip() != str(follows(example.problem, claim))
        for claim, box, example in zip(claims, boxes, examples, strict=True)
    ]
    ((common, _),) = Counter(claims).most_common(1)
    stock = [claim == common for claim in claims]
    return Readings(*(np.array(each, dtype=np.float64) for each in (misread, unfaithful, stock)))


def rollouts_at(
    model: Path,
    examples: Sequence[Example],
    severity: float | None,
    corruptions: Mapping[str, Corruption],
    *,
    answer_tokens: int,
    seed: int = 0,
    named: Named = named_digits,
) -> dict[str, float]:
    """Sampled rollouts on views as training draws them: shares in %.

    Args:
        model: a Hugging Face folder.
        examples: questions with their solutions.
        severity: the highest level of the views, from pool seen, levels spread as in training
            ("strong"); None: clean images.
        corruptions: the level table.
        answer_tokens: budget of a rollout, tokens.
        seed: of views and sampling.
        named: what a chain names.

    Returns:
        "rewarded", of all rollouts; "misread", of all; "poisoned", of the rewarded ones those that
        name a mark that is not there.
    """
    from roma.evaluate.answers import several_answerer
    from roma.models.qwen_vl import Policy

    policy = Policy.load(model)
    images: list[Any] = [policy.processor.resize(e.load_images()[0]) for e in examples]
    if severity is not None:
        keys = [(seed, "poisoned", example.id) for example in examples]
        table = {"corruptions": corruptions, "max_level": severity, "strength": "strong"}
        specs = [sample("seen", 1, key, **table)[0] for key in keys]  # type: ignore[arg-type]
        seeds = [seed_for(*key, "noise") for key in keys]
        images = degrade_batch(images, specs, seeds, corruptions=corruptions)
    answer = several_answerer(policy, max_new_tokens=answer_tokens, count=ROLLOUTS, temperature=1.0)
    made = answer([e.problem for e in examples], [[image] for image in images], seed=seed)
    rows = [(a, example) for own, example in zip(made, examples, strict=True) for a in own]
    score = compute_score(
        [
            {"response": a.text, "finished": a.finished, "ground_truth": example.answer}
            for a, example in rows
        ]
    )
    right = np.array([each["accuracy"] for each in score]) > 0.5
    wrong = np.array([named(a.text) != named(example.solution or "") for a, example in rows])
    return shares(right, wrong)


def shares(right: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> dict[str, float]:
    """Of rollouts that are right, and of those that name what is not there, in %."""
    return {
        "rewarded": 100 * float(right.mean()),
        "misread": 100 * float(wrong.mean()),
        "poisoned": 100 * float(wrong[right].mean()) if right.any() else 0.0,
    }
