r"""Rules that read the final answer of a response and compare it, for `--judge rules`.

A model that was trained to end in `\boxed{…}` is misread by some tasks' own rules, and some of
these take one word for another ("Grey" for "Green": both begin with an option's letter). These
rules are the same for every benchmark, and need no server:

1. The final answer is the content of the last `\boxed{…}` behind the reasoning, else of the last
   `<answer>…</answer>`, else what follows the last "answer is" or "answer:", else the last line.
2. A question with options: the letter of the right option, its text, or both.
3. Else the same text or number (`roma.rewards.math.same_answer`), a number that rounds to the
   truth's decimals or is within the benchmark's tolerance, or what math-verify calls equal.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

from roma.rewards import MathReward
from roma.rewards.boxed import last_box
from roma.rewards.marked import Failed
from roma.rewards.math import same_answer


@dataclass(frozen=True)
class Answered:
    """An answer to compare.

    Attributes:
        problem: the question as the task words it, options included.
        truths: the right answers, of which one is enough.
        response: all that the model said.
    """

    problem: str
    truths: tuple[str, ...]
    response: str


_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(r"\banswer[\s*_]{0,4}(?:is|:)[\s*_:]{0,4}(\S.*)", re.IGNORECASE)
_REASONED = re.compile(r"</(?:think|thinking|analysis)>", re.IGNORECASE)
_REASONS = re.compile(r"<(?:think|thinking|analysis)>", re.IGNORECASE)


def final_answer(response: str) -> str:
    r"""The final answer in a response; empty if it says nothing.

    Reasoning that was cut off has none, unless in a box or in tags.

    Example:
        >>> final_answer("<think> 3 + 5 </think> So **the answer is 8**.")
        '8'
    """
    rest = _REASONED.split(response)[-1].strip()
    if box := last_box(rest):
        return box.content
    if tagged := _TAGGED.findall(rest):
        return _bare(tagged[-1])
    if _REASONS.search(rest):
        return ""
    if said := _SAID.findall(rest):
        return _bare(said[-1])
    lines = rest.splitlines()
    return _bare(lines[-1]) if lines else ""


def _bare(text: str) -> str:
    """Without the marks around it that Markdown and sentences have."""
    return re.sub(r"^[\s*_`\"']+|[\s*_`\"'.]+$", "", text)


_MARK = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])[).:](?=\s|\S)\s*")


def options_of(problem: str) -> dict[str, str]:
    """The options that a question lists, by letter; empty if it lists none.

    Example:
        >>> options_of("Which is it? Options: A: red, B: dark red, C: blue")
        {'A': 'red', 'B': 'dark red', 'C': 'blue'}
    """
    marks = list(_MARK.finditer(problem))
    found: dict[str, str] = {}
    for mark, following in zip_longest(marks, marks[1:]):
        if mark[1] == "A":
            found = {}  # the last list counts: an example may stand before it
        if mark[1] == chr(ord("A") + len(found)):
            text = problem[mark.end() : following.start() if following else None]
            found[mark[1]] = text.strip().partition("\n")[0].strip(" ,;.")
    return found if len(found) > 1 else {}


_LETTER = re.compile(r"(?:option|choice)?\s*\(?([A-J])(?:[).:]+\s*(\S.*)?)?", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def same_option(answer: str, truth: str, options: dict[str, str]) -> bool:
    """Whether an answer names the option that the truth names, by letter or by text.

    Example:
        >>> same_option("(B) dark red", "b", {"A": "red", "B": "dark red"})
        True
    """
    right = _named(truth, options)
    return right is not None and _named(_TEXT.sub(r"\1", answer), options) == right


def _named(text: str, options: dict[str, str]) -> str | None:
    """The letter of the option that a text names."""
    texts = [letter for letter, option in options.items() if same_answer(text, option)]
    if len(texts) == 1:
        return texts[0]
    found = _LETTER.fullmatch(text.strip(" $"))
    letter = found[1].upper() if found else None
    if not found or (options and letter not in options):
        return None
    told = found[2]  # "B. dark red" names B, unless this is another option's text
    others = [option for other, option in options.items() if other != letter]
    return None if told and any(same_answer(told, option) for option in others) else letter


_NUMBER = re.compile(
    r"[$€£≈~]?\s*([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)\s*(?:%|°|[^\W\d_].*)?"
)


def near_number(answer: str, truth: str, tolerance: float = 0.0) -> bool:
    """Whether two numbers agree to the truth's decimals, or to a share of the truth.

    A unit behind the answer is not compared, nor is a percent sign. A truth without decimals is
    met exactly, or within the tolerance.

    Example:
        >>> near_number("3.142 cm", "3.14"), near_number("96", "100", tolerance=0.05)
        (True, True)
    """
    found, right = _NUMBER.fullmatch(answer.strip()), _NUMBER.fullmatch(truth.strip())
    if not (found and right and any(map(str.isdigit, found[1]))):
        return False
    with suppress(ValueError):  # of a truth that is a unit alone
        a, b = (float(text[1].replace(",", "")) for text in (found, right))
        decimals = len(right[1].partition(".")[2])
        half = 0.5 * 10**-decimals * (1 + 1e-9) if decimals else 0.0
        return abs(a - b) <= max(half, tolerance * abs(b))
    return False


class Rules:
    """The rules, over many answers; math-verify runs in a process of its own.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self) -> None:
        """Starts the process."""
        self._math = MathReward(format_weight=0.0)

    def right(self, answers: Sequence[Answered], tolerance: float = 0.0) -> list[bool | None]:
        """Of each answer whether it is right; None: comparing it took too long.

        Args:
            answers: all of one benchmark.
            tolerance: of a number, as a share of the true one; 0.05 is ChartQA's.
        """
        finals = [final_answer(answer.response) for answer in answers]
        found: list[bool | None] = []
        for answer, final in zip(answers, finals, strict=True):
            options = options_of(answer.problem)
            found.append(any(_plainly(final, t, options, tolerance) for t in answer.truths))
        asked = [
            (at, truth)
            for at, answer in enumerate(answers)
            if not found[at] and finals[at]
            for truth in answer.truths
            if not _is_option(truth, options_of(answer.problem))
        ]
        boxed = [
            {"response": rf"\boxed{{{finals[at]}}}", "ground_truth": truth} for at, truth in asked
        ]
        for (at, _), score in zip(asked, self._math(boxed), strict=True):
            if isinstance(score, Failed):
                found[at] = found[at] or None
            elif score["accuracy"] == 1:
                found[at] = True
        return found

    def close(self) -> None:
        """Ends the process."""
        self._math.close()


def _plainly(final: str, truth: str, options: dict[str, str], tolerance: float) -> bool:
    if not final:
        return False
    if _is_option(truth, options):
        return same_option(final, truth, options)
    return same_answer(final, truth) or near_number(final, truth, tolerance)


def _is_option(truth: str, options: dict[str, str]) -> bool:
    """Whether a true answer is one of options, listed in the question or only in its image."""
    letter = re.fullmatch(r"\(?[A-J]\)?", truth.strip(), re.IGNORECASE)
    return bool(letter or (options and _named(truth, options)))
