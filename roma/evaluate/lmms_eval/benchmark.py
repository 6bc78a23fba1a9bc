"""A task of lmms-eval as a benchmark: questions, right answers, what to know of its rules."""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from roma.evaluate.lmms_eval.rules import Answered

PAPER = {
    "mathvista_testmini_cot_reasoning": "acc_score",
    "wemath_testmini_reasoning": "acc_score",
    "chartqa_reasoning": "relaxed_overall_acc_score",
    "logicvista_reasoning": "acc_score",
    "mmstar_reasoning": "acc_score",
    "VisualPuzzles_cot": "exact_match",
    "realworldqa_reasoning": "acc_score",
}
"""The seven benchmarks of the paper as lmms-eval names them, and the metric of each."""

_TOLERANCES = {"chartqa": 0.05}
"""Of numbers, by the start of the task's name: ChartQA's relaxed accuracy."""

_LOWER = (
    'its own rules compare with lower-cased truths: "A" and "Yes" are wrong where "a" and "yes" '
    "are right; --judge rules reads both"
)
_LETTER = (
    'its own rules take a truth with a capital A to H in it for an option: "Grey" is right for '
    '"Green"; --judge rules compares the words'
)
_RULES = dict.fromkeys(PAPER, _LETTER) | {"realworldqa_reasoning": _LOWER}
del _RULES["VisualPuzzles_cot"]
"""What to know of the rules of a task."""


@dataclass
class Benchmark:
    """A task of lmms-eval, loaded.

    Attributes:
        name: the task's.
        task: lmms-eval's object.
        size: questions that are asked: the first of its documents.
        metric: the key of `process_results` that says if an answer is right; empty where the task's
            rules do not say it.
        notes: what was overridden.
    """

    name: str
    task: Any
    size: int
    metric: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def of_its_rules(self) -> list[str]:
        """What to know where its own rules say what is right."""
        return [_RULES[self.name]] if self.name in _RULES else []

    @property
    def tolerance(self) -> float:
        """Of a number, as a share of the true one, for `--judge rules`."""
        starts = (share for name, share in _TOLERANCES.items() if self.name.startswith(name))
        return next(starts, 0.0)

    def id(self, index: int) -> str:
        """Of a question, the same in every run."""
        return f"{self.name}/{index}"

    def doc(self, index: int) -> Any:
        """A document without its images."""
        return self.task.eval_docs_no_media[index]

    def whole_docs(self) -> Iterator[Any]:
        """The documents with their images, one at a time."""
        return (self.task.eval_docs[index] for index in range(self.size))

    def instance(self, index: int) -> Any:
        """A request of its own for a question, as lmms-eval's models take it."""
        made = copy.copy(self.task.instances[index])
        made.resps, made.filtered_resps = [], {}
        return made

    def answered(self, index: int, response: str) -> Answered:
        """A response with its question and the right answers, for rules or a judge."""
        doc = self.doc(index)
        return Answered(str(self.task.doc_to_text(doc)), self._truths(doc), response)

    def fingerprint(self) -> str:
        """Of questions and right answers: other data, other results."""
        digest = hashlib.sha256()
        for index in range(self.size):
            answered = self.answered(index, "")
            for part in (answered.problem, *answered.truths):
                digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:16]

    def _truths(self, doc: Any) -> tuple[str, ...]:
        target = self.task.doc_to_target(doc)
        if isinstance(target, int) and self.task.config.doc_to_choice is not None:
            target = self.task.doc_to_choice(doc)[target]
        several = target if isinstance(target, list | tuple) else [target]
        return tuple(str(each) for each in several)
