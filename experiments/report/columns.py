"""Which columns stand for a comparison: one inside the range of training, one beyond it."""

from collections.abc import Mapping
from typing import Any

from roma.evaluate.columns import columns_of


def compared(tree: Mapping[str, Any], trained_to: float | None = None) -> tuple[list[str], ...]:
    """The columns inside the range of training views, and those beyond it.

    Args:
        tree: pool → level → entry, as in report.json.
        trained_to: the strongest level that training views have; None: every level counts as
            inside, so that each pool stands at its highest.

    Returns:
        "clean" and each pool at its highest level up to `trained_to`; each pool at its highest
        level above. Either may be empty.

    Example:
        >>> levels = {"L1": {}, "L3": {}, "L4": {}}
        >>> compared({"clean": {"mean": 90.0}, "seen": levels}, 3.5)
        (['clean', 'seen L3'], ['seen L4'])
        >>> compared({"clean": {"mean": 90.0}, "seen": levels})
        (['clean', 'seen L4'], [])
    """
    inside, beyond = [], []
    for pool, found in tree.items():
        if "mean" in found:
            inside.append(pool)
            continue
        levels = sorted(int(level[1:]) for level in found)
        within = [level for level in levels if trained_to is None or level <= trained_to]
        inside += [f"{pool} L{level}" for level in within[-1:]]
        beyond += [f"{pool} L{level}" for level in levels[len(within) :][-1:]]
    return inside, beyond


def compared_in(report: Mapping[str, Any]) -> tuple[list[str], ...]:
    """`compared` for a report: its arms share their columns."""
    return compared(next(iter(report["arms"].values())), report.get("trained_to"))


def only(tree: Mapping[str, Any], trained_to: float | None) -> dict[str, Any]:
    """The compared columns of a tree, flat: column → entry."""
    flat = columns_of(tree)
    return {column: flat[column] for part in compared(tree, trained_to) for column in part}


def range_of_training(report: Mapping[str, Any]) -> str:
    """What training saw of the levels, in a sentence; empty where the report does not say.

    Example:
        >>> levels = {"L1": {}, "L3": {}, "L4": {}}
        >>> range_of_training({"trained_to": 3.5, "arms": {"roma": {"seen": levels}}})
        'Training views go up to level 3.5: L1 and L3 lie inside this range, L4 beyond it.'
    """
    trained_to = report.get("trained_to")
    if trained_to is None:
        return ""
    tree = next(iter(report["arms"].values()))
    levels = sorted({int(at[1:]) for found in tree.values() if "mean" not in found for at in found})
    inside = [f"L{level}" for level in levels if level <= trained_to]
    beyond = [f"L{level}" for level in levels if level > trained_to]
    parts = [
        f"{_listed(inside)} {'lies' if len(inside) == 1 else 'lie'} inside this range",
        f"{_listed(beyond)} beyond it",
    ]
    said = ", ".join(part for part, names in zip(parts, (inside, beyond), strict=True) if names)
    return f"Training views go up to level {trained_to:g}: {said}."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
