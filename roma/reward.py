r"""Rewards for `<think> … </think> … \boxed{answer}`, under EasyR1's signature."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from roma.kernels.checks import fail

RewardInput = Mapping[str, Any]
RewardFunction = Callable[[Sequence[RewardInput]], list[dict[str, float]]]

KEYS = ("overall", "format", "accuracy")


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


def same_answer(answer: str, truth: str) -> bool:
    r"""Whether two answers are the same number, or the same text but for how it is set.

    Case, blanks and LaTeX dressing such as $, \text{} and \left do not count.

    Numbers are compared exactly: 1,000 = 1000.0; 0.5 = 1/2 = \frac{1}{2}; a percent sign is
    dropped, so 50% = 50. Nothing is evaluated: 2+3 is not 5.

    Example:
        >>> same_answer(r"\frac{1}{2}", "0.50"), same_answer(r"\text{Rice}", "rice")
        (True, True)
    """
    left, right = _undress(answer), _undress(truth)
    if left == right:
        return left != ""
    a, b = _number(left), _number(right)
    return a is not None and a == b


# In this order. What stands here changes how an answer is set, never what it says.
_DRESS = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\?\$"), ""),
    (re.compile(r"\\[,;:! ]"), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\?%|\^\s*(?:\\circ|\{\s*\\circ\s*\})|°"), ""),
    (re.compile(r"\{,\}"), ","),  # 1{,}000
    (re.compile("\u2212"), "-"),  # the minus sign of typography
    (re.compile(r"\s*([^\w\s.])\s*"), r"\1"),  # (1, 2) is (1,2), x + 1 is x+1; but 8 8 is not 88
    (re.compile(r"\s+"), " "),
    (re.compile(r"^\(([a-z])\)$"), r"\1"),  # an option: (b) is b
)


def _undress(text: str) -> str:
    text = text.strip().removesuffix(".").casefold()
    for pattern, replacement in _DRESS:
        text = pattern.sub(replacement, text).strip()
    return text


_DECIMAL = r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,2})?"
_RATIO = re.compile(rf"(?P<sign>)(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?")
_FRAC = re.compile(
    rf"(?P<sign>[+-]?)\s*\\frac\s*\{{\s*(?P<top>{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}"
)


def _number(text: str) -> Fraction | None:
    r"""Exact value of a decimal number, or of a ratio or \frac of two; None for anything else."""
    match = _FRAC.fullmatch(text) or _RATIO.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        return None
    top, bottom = (
        Fraction(Decimal((digits or "1").replace(",", "")))
        for digits in match.group("top", "bottom")
    )
    sign = -1 if match["sign"] == "-" else 1
    return sign * top / bottom if bottom else None


def compute_score(
    reward_inputs: Sequence[RewardInput],
    *,
    format_weight: float = 0.1,
    strict_end: bool = True,
    think: tuple[str, str] | None = ("<think>", "</think>"),
) -> list[dict[str, float]]:
    r"""Scores responses that reason between tags and end in a box.

        overall = (1 − w)·accuracy + w·format,   w = format_weight          (EasyR1's weighting)

    accuracy is 1 if the content of the last `\boxed{…}` is the ground truth (`same_answer`), else
    0. format is 1 if the response is `<think> … </think> … \boxed{…}`, each tag once, with nothing
    but blanks around it, and is finished; else 0.

    Args:
        reward_inputs: per response a mapping with "response" (text), "ground_truth", and, if known,
            "finished": False when the end token never came (taken as True if absent).
            "response_length" is there for other reward functions.
        format_weight: w in 0..1.
        strict_end: demand the end right after the box for accuracy too. Without it a run learns to
            ramble: text behind a right answer would cost only the format's small share. Set it to
            False for a model that writes `$\boxed{5}$.`
        think: the two tags; an empty first one if the prompt already opens it; None demands the box
            alone.

    Returns:
        Per response {"overall", "format", "accuracy"}, each in 0..1.

    Raises:
        ValueError: format_weight out of range, or a key is missing.

    Example:
        >>> response = r"<think> 3 + 5 </think> \boxed{8}"
        >>> compute_score([{"response": response, "response_length": 9, "ground_truth": "8"}])
        [{'overall': 1.0, 'format': 1.0, 'accuracy': 1.0}]
    """
    if not 0 <= format_weight <= 1:
        fail("format_weight", "a number in 0..1", str(format_weight), "it is the format's share")
    before_box = _before_box(think)
    scores = []
    for index, item in enumerate(reward_inputs):
        for key in ("response", "ground_truth"):
            if key not in item:
                got = f"the keys {sorted(item)}"
                fail(f"reward_inputs[{index}]", f"the key '{key}'", got, "add it")
        well_formed = right = False
        response = str(item["response"])
        if box := last_box(response):
            ended = bool(item.get("finished", True)) and not response[box.end :].strip()
            well_formed = ended and bool(before_box.fullmatch(response, 0, box.start))
            counts = ended or not strict_end
            right = counts and same_answer(box.content, str(item["ground_truth"]))
        overall = (1 - format_weight) * right + format_weight * well_formed
        scores.append({"overall": overall, "format": float(well_formed), "accuracy": float(right)})
    return scores


def _before_box(think: Sequence[str] | None) -> re.Pattern[str]:
    """What must stand before the box for the format's reward."""
    if think is None:
        return re.compile(r".*", re.DOTALL)
    if len(think) != 2 or not think[1]:
        fail("think", "(opening tag, closing tag)", repr(think), "only the first may be empty")
    opening, closing = map(re.escape, think)
    tags = "|".join(tag for tag in (opening, closing) if tag)
    text = rf"(?:(?!{tags}).)*"
    return re.compile(rf"\s*{opening}{text}{closing}{text}", re.DOTALL)


def load_reward(spec: str, **options: Any) -> RewardFunction:
    """Loads a reward function of EasyR1's signature, as `compute_score` has it.

    The function that comes back checks each call's result, so that a slip in a reward file shows at
    the first batch.

    Args:
        spec: "file.py:function", or "package.module:function", as "roma.reward:compute_score".
        options: keywords to bind, as `format_weight=0.5`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: spec is no such pair, the function is not in the file, or it does not take an
            option. The loaded function raises ValueError for a wrong number of results, a missing
            key or a value that is not finite, and TypeError for results of a wrong type. More keys
            than the three are let through.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        fail("reward", "'file.py:function'", repr(spec), "name the file and the function in it")
    is_file = source.endswith(".py")
    module = _load_file(Path(source).expanduser()) if is_file else importlib.import_module(source)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(key for key, value in vars(module).items() if inspect.isfunction(value))
        near = difflib.get_close_matches(name, found, n=1)
        guess = f"did you mean '{near[0]}'?" if near else "define it there"
        fail("reward", f"a function '{name}' in {source}", f"the functions {found}", guess)
    try:
        inspect.signature(function).bind([], **options)
    except TypeError as error:
        expected = f"that {spec} takes a list and the options {sorted(options)}"
        fail("reward", expected, str(error), "correct the function or the options")
    bound = functools.partial(function, **options)

    @functools.wraps(function)
    def checked(reward_inputs: Sequence[RewardInput]) -> list[dict[str, float]]:
        scores = bound(reward_inputs)
        _check_scores(spec, scores, len(reward_inputs))
        return scores

    return checked


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        fail("reward", "an existing file", str(path), "check the path", error=FileNotFoundError)
    module_name = f"roma_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # always so for a .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a module up by its name
    module_spec.loader.exec_module(module)
    return module


def _check_scores(spec: str, scores: object, count: int) -> None:
    if not isinstance(scores, list) or not all(isinstance(score, dict) for score in scores):
        got = [type(score).__name__ for score in scores] if isinstance(scores, list) else scores
        fail(spec, "a list of dicts", repr(got)[:60], "return one per response", error=TypeError)
    if len(scores) != count:
        fail(spec, f"{count} results", str(len(scores)), "return one per response, in their order")
    for index, score in enumerate(scores):
        name = f"{spec}, result {index}"
        for key in KEYS:
            if key not in score:
                fail(name, f"the keys {KEYS}", f"{sorted(score)}", f"add '{key}'")
            if not _is_finite(score[key]):
                fail(name, f"a finite number under '{key}'", repr(score[key]), "return a float")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False
