"""The columns of a report: clean, and each pool at each level."""

from collections.abc import Mapping
from typing import Any


def columns_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of the report, flat: "clean", "seen L1", … → entry.

    Example:
        >>> list(columns_of({"clean": {"mean": 90.0}, "seen": {"L3": {"mean": 80.0}}}))
        ['clean', 'seen L3']
    """
    flat: dict[str, Any] = {}
    for pool, found in tree.items():
        named = {f"{pool} {level}": entry for level, entry in found.items()}
        flat.update({pool: found} if "mean" in found else named)
    return flat


def hardest_columns(tree: Mapping[str, Any]) -> list[str]:
    """The names of "clean" and of each pool at its highest level, as in `columns_of`."""
    return [
        pool if "mean" in found else f"{pool} {list(found)[-1]}" for pool, found in tree.items()
    ]
