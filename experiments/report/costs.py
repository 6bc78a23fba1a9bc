"""What the arms of a report took to train: steps and CPU seconds."""

from collections.abc import Mapping, Sequence
from typing import Any


def costs_of(arms: Sequence[str], runs: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Steps and CPU seconds of each arm's training, seed by seed; the warm start has none."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, took in runs.items():
        arm = name.rpartition("-seed")[0]
        if arm in arms and took["steps"]:
            own = found.setdefault(arm, {"steps": [], "cpu_s": []})
            own["steps"].append(took["steps"])
            own["cpu_s"].append(took["train_cpu_s"])
    return found


def steps_of(costs: Mapping[str, Sequence[float]] | None) -> str:
    """Steps of an arm's runs.

    Example:
        >>> steps_of({"steps": [378, 417, 403]}), steps_of({"steps": [220, 220]}), steps_of(None)
        ('378–417', '220', '–')
    """
    if costs is None:
        return "–"
    low, high = min(costs["steps"]), max(costs["steps"])
    return f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}"


def cpu_seconds_of(costs: Mapping[str, Sequence[float]] | None) -> str:
    """CPU seconds of an arm's training, mean over runs."""
    return "–" if costs is None else f"{sum(costs['cpu_s']) / len(costs['cpu_s']):.0f}"
