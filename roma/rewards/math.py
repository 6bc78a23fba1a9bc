r"""Compares two answers: numbers by exact value, text without LaTeX formatting."""

import re
from decimal import Decimal
from fractions import Fraction


def same_answer(answer: str, truth: str) -> bool:
    r"""Whether two answers are the same number, or the same text.

    Text is compared without case, blanks and LaTeX formatting such as $, \text{} and \left.

    Numbers are compared exactly: 1,000 = 1000.0; 0.5 = 1/2 = \frac{1}{2}; a percent sign is
    dropped, so that 50% = 50. Nothing is evaluated: 2+3 is not 5.

    Example:
        >>> same_answer(r"\frac{1}{2}", "0.50"), same_answer(r"\text{Rice}", "rice")
        (True, True)
    """
    left, right = _unformatted(answer), _unformatted(truth)
    if left == right:
        return left != ""
    a, b = _number(left), _number(right)
    return a is not None and a == b


# Applied in this order. They change the formatting of an answer, never its meaning.
_FORMATTING = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\?\$"), ""),
    (re.compile(r"\\[,;:! ]"), " "),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\?%|\^\s*(?:\\circ|\{\s*\\circ\s*\})|°"), ""),
    (re.compile(r"\{,\}"), ","),  # 1{,}000
    (re.compile("\u2212"), "-"),  # the typographic minus sign
    (re.compile(r"\s*([^\w\s.])\s*"), r"\1"),  # (1, 2) is (1,2), x + 1 is x+1; but 8 8 is not 88
    (re.compile(r"\s+"), " "),
    (re.compile(r"^\(([a-z])\)$"), r"\1"),  # an option: (b) is b
)


def _unformatted(text: str) -> str:
    text = text.strip().removesuffix(".").casefold()
    for pattern, replacement in _FORMATTING:
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
