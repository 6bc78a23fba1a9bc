"""Options of a part that is switched off are refused: a run would ignore them without a word."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from roma_kernels.errors import fail


def check_unused(
    section: Any, key: str, where: str, remedy: str, *, options: Sequence[str] = ()
) -> None:
    """Refuses options that are not the defaults.

    Args:
        section: a dataclass whose fields all have defaults.
        key: its dotted key.
        where: when nothing but the default makes sense, as "without …" or "with …".
        remedy: what to do.
        options: names of those to check; none: all.

    Raises:
        ValueError: the message names the option by its dotted key.
    """
    default = type(section)()
    for name in options or [option.name for option in fields(section)]:
        own, usual = getattr(section, name), getattr(default, name)
        if own != usual:
            fail(f"{key}.{name}", f"{_text(usual)} {where}", _text(own), remedy)


def _text(value: object) -> str:
    """As YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
