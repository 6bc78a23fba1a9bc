"""The columns of an evaluation: clean, and each pool at each level."""

from collections.abc import Mapping, Sequence
from typing import Any


def columns_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of pools and levels, flat: "clean", "seen L1", … → what stands there.

    Example:
        >>> list(columns_of({"clean": {"mean": 90.0}, "seen": {"L3": {"mean": 80.0}}}))
        ['clean', 'seen L3']
    """
    flat: dict[str, Any] = {}
    for pool, found in tree.items():
        if pool == "clean" or "mean" in found:
            flat[pool] = found
        else:
            flat |= {f"{pool} {level}": entry for level, entry in found.items()}
    return flat


def hardest_columns(tree: Mapping[str, Any]) -> list[str]:
    """The names of "clean" and of each pool at its highest level, as in `columns_of`."""
    return [
        pool if "mean" in found else f"{pool} {max(found, key=lambda level: int(level[1:]))}"
        for pool, found in tree.items()
    ]


def groups_of(trees: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Every group of the trees → its sub-columns; those that are entries themselves come first.

    Example:
        >>> groups_of([{"seen": {"L1": None}}, {"clean": {"mean": 90.0}, "seen": {"L3": None}}])
        {'clean': [], 'seen': ['L1', 'L3']}
    """
    groups: dict[str, dict[str, None]] = {}
    for tree in trees:
        for name, found in tree.items():
            below = groups.setdefault(name, {})
            below.update(dict.fromkeys([] if "mean" in found else found))
    return {
        name: list(groups[name]) for name in sorted(groups, key=lambda name: groups[name] != {})
    }
