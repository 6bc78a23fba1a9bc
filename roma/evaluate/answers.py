"""Answers of a model, one or several a question, and which of them are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from roma.data import Example
from roma.evaluate.conditions import Image
from roma.rewards import Failed, MarkedReward, RewardFunction, same_answer
from roma.rewards.boxed import read_response
from roma_kernels.errors import fail

if TYPE_CHECKING:  # importing it takes seconds, and `roma eval --help` needs none of it
    from roma.models.qwen_vl import Policy
    from roma.rollout.base import Rollouts, Sampler


@dataclass(frozen=True)
class Answer:
    """What a model said: decoded text, its length in tokens, and whether an end token closed it."""

    text: str
    length: int
    finished: bool = True


class Answerer(Protocol):
    """Answers a batch of problems about images, one answer each, in order."""

    def __call__(
        self, problems: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> Sequence[Answer]:
        """One `Answer` per problem."""


class SeveralAnswerer(Protocol):
    """Answers a batch of problems about images, k times each, in order."""

    def __call__(
        self, problems: Sequence[str], images: Sequence[Sequence[Image]], *, seed: int
    ) -> Sequence[Sequence[Answer]]:
        """K answers per problem; `seed` is of the sampling."""


class Verdict(NamedTuple):
    """What the reward says of the k answers to a question.

    Attributes:
        correct: of each answer, 1 = right.
        voted: whether the most frequent answer is right; None for k = 1.
        unscored: how many the reward could not score; they count as wrong.
    """

    correct: list[int]
    voted: int | None
    unscored: int


def policy_answerer(
    policy: "Policy", *, max_new_tokens: int, sampler: "Sampler | None" = None
) -> Answerer:
    """Greedy answers of a policy, in batches; special tokens are left out of the texts.

    Args:
        policy: the model.
        max_new_tokens: budget of an answer, tokens; an answer cut there is not finished.
        sampler: the engine that runs it; None: transformers, on the policy itself.
    """
    several = several_answerer(policy, max_new_tokens=max_new_tokens, sampler=sampler)

    def answer(problems: Sequence[str], images: Sequence[Sequence[Image]]) -> list[Answer]:
        return [own for (own,) in several(problems, images, seed=0)]

    return answer


def several_answerer(
    policy: "Policy",
    *,
    max_new_tokens: int,
    count: int = 1,
    temperature: float | None = None,
    sampler: "Sampler | None" = None,
) -> SeveralAnswerer:
    """Answers of a policy, `count` a problem, sampled or greedy; else as `policy_answerer`.

    Args:
        policy: the model.
        max_new_tokens: budget of an answer, tokens.
        count: k, answers a problem.
        temperature: > 0; None: greedy.
        sampler: the engine that runs it; None: transformers, on the policy itself.
    """
    from roma.rollout.hf import HfSampler

    engine = sampler or HfSampler(policy)

    def answer(
        problems: Sequence[str], images: Sequence[Sequence[Image]], *, seed: int
    ) -> list[list[Answer]]:
        made = engine.sample(
            policy.encode_prompts(problems, images),
            group_size=count,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        rows = answers_of(policy, made)
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    return answer


def answers_of(policy: "Policy", made: "Rollouts") -> list[Answer]:
    """Completions as answers: one for each row."""
    texts = policy.processor.decode(made.tokens, made.mask)
    lengths, finished = made.mask.sum(-1).tolist(), made.finished.tolist()
    return [Answer(*row) for row in zip(texts, lengths, finished, strict=True)]


def correct_answers(
    answers: Sequence[Answer], examples: Sequence[Example], score: RewardFunction
) -> NDArray[np.uint8]:
    """[n]: 1 where the reward function calls the answer accurate."""
    verdicts = judged([[answer] for answer in answers], examples, score)
    return np.array([verdict.correct[0] for verdict in verdicts], dtype=np.uint8)


def judged(
    answers: Sequence[Sequence[Answer]], examples: Sequence[Example], score: MarkedReward
) -> list[Verdict]:
    """What the reward says of each question's answers; right is an accuracy of at least ½.

    Raises:
        ValueError: the number of answers or of scores is not what was asked for.
    """
    if len(answers) != len(examples):
        expected = f"{len(examples)} answers"
        fail("answer", expected, str(len(answers)), "return one per problem, in order")
    rows: list[dict[str, Any]] = [
        {
            "response": answer.text,
            "response_length": answer.length,
            "ground_truth": example.answer,
            "finished": answer.finished,
            "problem": example.question,
            "id": example.id,
        }
        for own, example in zip(answers, examples, strict=True)
        for answer in own
    ]
    scored = score(rows)
    if len(scored) != len(rows):
        fail("score", f"{len(rows)} scores", str(len(scored)), "return one per response, in order")
    scores, verdicts = iter(scored), []
    for own in answers:
        found = [next(scores) for _ in own]
        failed = [isinstance(one, Failed) for one in found]
        right = [
            int(not isinstance(one, Failed) and float(one["accuracy"]) >= 0.5) for one in found
        ]
        chosen = right[vote([answer.text for answer in own])] if len(own) > 1 else None
        verdicts.append(Verdict(right, chosen, sum(failed)))
    return verdicts


def vote(texts: Sequence[str]) -> int:
    r"""The most frequent final answer: the position of the first text that gives it.

    The final answer of a text is the content of its last box, or without one what stands behind
    the reasoning. Two are the same if `same_answer` says so. Of equally frequent ones the first
    counts.

    Example:
        >>> vote([r"\boxed{3}", r"so \boxed{0.5}", r"\boxed{\frac{1}{2}}", "none"])
        1
    """
    finals = [read_response({"response": text}) for text in texts]
    said = [found.rest if found.box is None else found.box for found in finals]
    groups: list[list[int]] = []
    for position, final in enumerate(said):
        for group in groups:
            first = group[0]
            boxed = (finals[first].box is None) == (finals[position].box is None)
            if boxed and (said[first] == final or same_answer(said[first], final)):
                group.append(position)
                break
        else:
            groups.append([position])
    return max(groups, key=len)[0]
