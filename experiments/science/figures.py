"""The figures of docs/SCIENCE.md, drawn from its CSV files."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.plots import arm_style
from experiments.science.plan import METHODS, SEVERITIES, at
from experiments.science.results import Table
from roma.evaluate.figures import LineStyle, styled

_PANELS = (
    ("accuracy", "clean", "clean images"),
    ("accuracy", "seen L3", "seen corruptions, L3"),
    ("accuracy", "unseen L3", "unseen corruptions, L3"),
    ("training", "reward, last fifth", "training: right rollouts"),
    ("accuracy", "seen L4", "seen corruptions, L4"),
    ("accuracy", "unseen L4", "unseen corruptions, L4"),
)
_SHIFT = 0.07  # levels, between the marks of two methods at one severity


@styled
def severity(table: Table) -> Figure:
    """Accuracy over the severity of training views, a line a method; GRPO, without any, is level 0.

    Args:
        table: of the study "severity" on one split.

    Returns:
        Six panels: clean, L3 of seen and unseen; training reward, L4 of seen and unseen. Bars are
        95 % intervals over seeds and images; of the training reward the range over seeds.
    """
    figure = Figure(figsize=(12.6, 7.4), layout="constrained")
    panels = figure.subplots(2, 3)
    for panel, (kind, column, title) in zip(panels.ravel(), _PANELS, strict=True):
        _panel(panel, table, kind, column)
        panel.set(title=title, ylabel="%")
    for panel in panels[1]:
        panel.set_xlabel("highest level of training views; 0: none")
    styles = [arm_style("grpo"), *(arm_style(method) for method in METHODS)]
    handles = [Line2D([], [], color=style.colour, marker=style.marker) for style in styles]
    labels = ["GRPO, no views", *(style.label for style in styles[1:])]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _panel(panel: Axes, table: Table, kind: str, column: str) -> None:
    grpo = table.entry(kind, "grpo", column)
    style = arm_style("grpo")
    panel.axhline(grpo["mean"], color=style.colour, linewidth=1, linestyle="--")
    _mark(panel, [0.0], [grpo], style)
    for turn, method in enumerate(METHODS):
        shift = _SHIFT * (turn - (len(METHODS) - 1) / 2)
        places = [severity + shift for severity in SEVERITIES]
        found = [table.entry(kind, at(method, severity), column) for severity in SEVERITIES]
        _mark(panel, places, found, arm_style(method))
    panel.set_xticks([0, *SEVERITIES], [f"{level:g}" for level in (0, *SEVERITIES)])
    panel.grid(axis="x", visible=False)


def _mark(
    panel: Axes, places: Sequence[float], found: Sequence[dict[str, float]], style: LineStyle
) -> None:
    means = [each["mean"] for each in found]
    below = [each["mean"] - each["low"] for each in found]
    above = [each["high"] - each["mean"] for each in found]
    panel.errorbar(
        places, means, yerr=[below, above], color=style.colour, marker=style.marker,
        linestyle=style.line, linewidth=1.6, elinewidth=1, markersize=6,
    )  # fmt: skip


@styled
def ablations(table: Table, arms: Sequence[tuple[str, str]], against: str) -> Figure:
    """What each change does to ROMA: a row an arm, a panel a column, with intervals and seeds.

    Args:
        table: of the study "ablations".
        arms: (arm, label), from the top.
        against: the unchanged arm.
    """
    columns = ("clean", "seen L3", "unseen L3")
    figure = Figure(figsize=(12.6, 0.36 * len(arms) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True)
    colour = arm_style("roma").colour
    for panel, column in zip(panels, columns, strict=True):
        for row, (arm, _) in enumerate(arms):
            found = table.entry("difference", arm, column, against=against)
            panel.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=1.4)
            panel.plot(found["mean"], row, "o", color=colour, markersize=6)
            seeds = table.seeds("difference", arm, column, against=against)
            panel.plot(seeds, [row] * len(seeds), "|", color="#555555", markersize=8)
        panel.axvline(0, color="#777777", linewidth=1)
        panel.set(title=column, xlabel="points over ROMA")
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(arms)), [label for _, label in arms])
    panels[0].invert_yaxis()
    return figure
