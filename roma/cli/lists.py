"""Values separated by commas, as an argparse type."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """An argparse type: values separated by commas."""

    def parse(text: str) -> list[T]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    parse.__name__ = f"comma-separated {kind.__name__}"  # argparse names it in its message
    return parse
