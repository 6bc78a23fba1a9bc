"""The one form of an error message: what is wrong, what was expected, what came, the remedy."""

from typing import NoReturn


def fail(
    name: str, expected: str, got: str, remedy: str, *, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `error` in the house's one form: name, what was expected, what came, what to do."""
    raise error(f"{name}: expected {expected}, got {got}; {remedy}")
