"""How numbers, names and findings are worded: on a terminal, on a page, in Markdown."""

from collections.abc import Mapping
from typing import Any

from roma.evaluate.columns import columns_of, hardest_columns

Entry = Mapping[str, float]
"""{"mean", "low", "high", "n"}, in percent or, for a difference, in points."""


def number(value: float) -> str:
    """A number; what rounds to nought has no sign.

    Example:
        >>> number(-2.04), number(-0.04)
        ('−2.0', '0.0')
    """
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def signed_number(value: float) -> str:
    """A number with its sign; there is no minus nought.

    Example:
        >>> signed_number(-2.04), signed_number(-0.04)
        ('−2.0', '+0.0')
    """
    text = f"{value:+.1f}"
    return "+0.0" if text == "-0.0" else text.replace("-", "−")


def signed(entry: Entry) -> str:
    """A difference with its interval.

    Example:
        >>> signed({"mean": 2.04, "low": 0.5, "high": 4.6})
        '+2.0 [+0.5, +4.6]'
    """
    low, high = signed_number(entry["low"]), signed_number(entry["high"])
    return f"{signed_number(entry['mean'])} [{low}, {high}]"


def with_interval(entry: Entry) -> str:
    """A share with its interval.

    Example:
        >>> with_interval({"mean": 81.25, "low": 79.0, "high": 83.4})
        '81.2 [79.0, 83.4]'
    """
    return f"{number(entry['mean'])} [{number(entry['low'])}, {number(entry['high'])}]"


def direction(entry: Entry) -> str:
    """Which way a difference points: "up" or "down" where its interval excludes 0, else ""."""
    return "up" if entry["low"] > 0 else "down" if entry["high"] < 0 else ""


_VERDICTS = {"up": "higher", "down": "lower", "": "no difference shown"}


def finding(subject: str, tree: Mapping[str, Any]) -> str:
    """One sentence on differences: clean, and each pool at its highest level.

    Args:
        subject: what the differences are of, e.g. "ROMA minus GRPO".
        tree: pool → level → difference in points; an entry that could not be taken is None.
    """
    flat, said = columns_of(tree), []
    for column in hardest_columns(tree):
        entry = flat[column]
        if entry is not None:
            part = f"{column} {signed(entry)} ({_VERDICTS[direction(entry)]})"
            said.append(part.replace(" ", "\u00a0"))
    return f"{subject}, in points: {'; '.join(said)}."


def short(name: str, *, width: int = 28) -> str:
    """A name for a legend: one line, its middle left out where it is longer than `width`.

    Example:
        >>> short("Qwen2.5-VL-7B-Instruct-roma-global_step_300")
        'Qwen2.5-VL-7B-…obal_step_300'
    """
    flat = " ".join(name.split())
    if len(flat) <= width:
        return flat
    head = width // 2
    return f"{flat[:head]}…{flat[head + 1 - width :]}"
