"""What the arms of a report took to train: steps and CPU seconds."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def trained(runs: Mapping[str, Any]) -> Iterator[tuple[str, int, float, float]]:
    """Arm, seed, steps and CPU seconds of every training run, by seed; the warm start is none.

    Args:
        runs: "<arm>-seed<k>" → "steps", "train_cpu_s".
    """
    named = [(name.rpartition("-seed"), took) for name, took in runs.items() if took["steps"]]
    for (arm, _, seed), took in sorted(named, key=lambda run: int(run[0][2])):
        yield arm, int(seed), took["steps"], took["train_cpu_s"]


def costs_of(arms: Sequence[str], runs: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Steps and CPU seconds of each arm's training, seed by seed; the warm start has none."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm, _, steps, cpu_s in trained(runs):
        if arm in arms:
            own = found.setdefault(arm, {"steps": [], "cpu_s": []})
            own["steps"].append(steps)
            own["cpu_s"].append(cpu_s)
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
