"""Learning curves from the training logs of all arms and seeds."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.plots import ARMS, arm_order, arm_style
from roma.evaluate.figures import KINDS, styled
from roma.evaluate.report.plots import shared_legend

_CURVES = (
    ("reward/overall", "Reward (overall)", "mean reward"),
    ("reward/accuracy", "Training accuracy (rollouts)", "share right"),
    ("reward/format", "Format reward (rollouts)", "share well formed"),
    ("val/accuracy", "Validation accuracy", "share right"),
    ("rollout/distinct_share", "Distinct rollouts", "share of the batch's rows"),
    ("response_length/mean", "Completion length", "tokens"),
    ("timing_s/step", "Time per step", "s"),
)


_PENALTY, _WORST = "actor/roma_penalty/", "actor/roma_worst_view/"

Metrics = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl, each with "step", "arm", "seed" and the metrics logged there."""


@styled
def learning_curves(metrics: Metrics) -> Figure:
    """The logged quantities over the steps; one that no log holds has no panel.

    Args:
        metrics: of `experiments.report.report.read_metrics`.

    Returns:
        Panels with the mean over seeds, each seed smoothed by a running mean over 1/30 of its
        steps; bands are the range over seeds. Then the penalty of the arm "roma", or of all if none
        is that (worst and mean over views; per corruption), and how often each corruption was the
        worst view.
    """
    logged = {key for row in metrics for key in row}
    draw: list[Callable[[Axes], None]] = [
        functools.partial(_arms_panel, metrics=metrics, key=key, title=title, unit=unit)
        for key, title, unit in _CURVES
        if key in logged
    ]
    ours = [row for row in metrics if row.get("arm") == "roma"] or metrics
    if {"actor/roma_penalty_worst", "actor/roma_penalty_mean"} & logged:
        draw.append(functools.partial(_penalty_panel, metrics=ours))
    for prefix, panel in ((_PENALTY, _kinds_panel), (_WORST, _worst_panel)):
        if any(key.startswith(prefix) for row in ours for key in row):
            draw.append(functools.partial(panel, metrics=ours))
    columns = min(3, max(1, len(draw)))
    lines = -(-max(1, len(draw)) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, fill in zip(panels, draw, strict=False):
        fill(panel)
    for panel in panels[len(draw) :]:
        panel.set_axis_off()
    if not draw:
        panels[0].set_title("no training metrics were logged")
    shared_legend(figure, panels[0])
    return figure


def _over_seeds(rows: Metrics, key: str) -> NDArray[np.float64]:
    """[4, S]: the S steps at which `key` was logged; its mean, least and greatest over seeds."""
    seeds: dict[Any, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None and np.isfinite(row[key]):
            seeds.setdefault(row.get("seed"), {})[row["step"]] = row[key]
    at: dict[int, list[float]] = {}
    for logged in seeds.values():
        steps = sorted(logged)
        for step, value in zip(steps, _smooth([logged[step] for step in steps]), strict=True):
            at.setdefault(step, []).append(float(value))
    found = [(step, np.mean(at[step]), min(at[step]), max(at[step])) for step in sorted(at)]
    return np.array(found, dtype=np.float64).reshape(-1, 4).T


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Running mean over 1/30 of the points, centred; at the ends over what there is."""
    kernel = np.ones(max(1, len(values) // 30))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _curve(
    panel: Axes, rows: Metrics, key: str, label: str, *, colour: str, line: str = "-"
) -> None:
    """One quantity as a line with its band over seeds; nothing where it was not logged."""
    steps, mean, low, high = _over_seeds(rows, key)
    if len(steps):
        panel.plot(steps, mean, color=colour, label=label, linestyle=line, linewidth=1.6)
        panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _arms_panel(panel: Axes, *, metrics: Metrics, key: str, title: str, unit: str) -> None:
    """One quantity, a line per arm."""
    for arm in arm_order({row.get("arm", "run"): None for row in metrics}):
        rows, style = [row for row in metrics if row.get("arm", "run") == arm], arm_style(arm)
        _curve(panel, rows, key, style.label, colour=style.colour, line=style.line)
    panel.set(title=title, xlabel="step", ylabel=unit)


def _penalty_panel(panel: Axes, *, metrics: Metrics) -> None:
    """The penalty of the worst view, and of the mean over views."""
    colour = ARMS["roma"].colour
    _curve(panel, metrics, "actor/roma_penalty_worst", "worst, right rollouts", colour=colour)
    _curve(
        panel, metrics, "actor/roma_penalty_mean", "mean, right rollouts", colour=colour, line="--"
    )
    panel.set(title="ROMA: invariance penalty", xlabel="step", ylabel="k3, nats per token")
    panel.legend(fontsize=9)


def _kinds_panel(panel: Axes, *, metrics: Metrics) -> None:
    """The penalty of each corruption."""
    for turn, kind in enumerate(_kinds(metrics, _PENALTY)):
        _curve(panel, metrics, _PENALTY + kind, kind.replace("_", " "), colour=KINDS[turn % 9])
    panel.set(title="ROMA: penalty per corruption", xlabel="step", ylabel="k3, nats per token")
    panel.legend(fontsize=9)


def _worst_panel(panel: Axes, *, metrics: Metrics) -> None:
    """How often each corruption was the worst view, in three thirds of training."""
    kinds = _kinds(metrics, _WORST)
    rows = [row for row in metrics if any(key.startswith(_WORST) for key in row)]
    bounds = np.quantile([row["step"] for row in rows], [1 / 3, 2 / 3])
    thirds = np.searchsorted(bounds, [row["step"] for row in rows])
    tones = {"first third": "#e6ab84", "middle third": "#D55E00", "last third": "#7a3600"}
    for third, (name, tone) in enumerate(tones.items()):
        part = [row for row, its in zip(rows, thirds, strict=True) if its == third]
        # A kind that a step does not log was not drawn there, so it was never the worst.
        shares = [
            100 * sum(row.get(_WORST + k, 0) for row in part) / max(1, len(part)) for k in kinds
        ]
        panel.bar(np.arange(len(kinds)) + 0.27 * (third - 1), shares, 0.25, color=tone, label=name)
    panel.set_xticks(range(len(kinds)), [k.replace("_", "\n") for k in kinds], fontsize=9)
    panel.set(title="ROMA: which view was worst", ylabel="% of sequences")
    panel.grid(axis="x", visible=False)
    panel.set_ylim(top=1.2 * panel.get_ylim()[1])  # room for the legend above the bars
    panel.legend(fontsize=9, ncols=3, loc="upper center")


def _kinds(metrics: Metrics, prefix: str) -> list[str]:
    """The corruptions that are logged under `prefix`, in alphabetical order."""
    logged = {key for row in metrics for key in row if key.startswith(prefix)}
    return sorted(key.removeprefix(prefix) for key in logged)
