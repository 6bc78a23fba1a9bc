"""The figures of docs/SCIENCE.md, drawn from its CSV files."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.report.plots import arm_style
from experiments.science.plan import METHODS, SEVERITIES, at
from experiments.science.results import Table
from roma.evaluate.figures import styled
from roma.evaluate.wording import number

_REWARD = "reward, last fifth"
_SHIFT = 0.07  # levels, between the marks of two methods at one severity
_Entry = dict[str, float]


@styled
def severity(table: Table, seen: Table) -> Figure:
    """What views of growing severity do, a line a method, beside GRPO, which has none.

    Args:
        table: of the study "severity" on one split.
        seen: of the stage "perception".

    Returns:
        Eight panels. Differences to GRPO: clean, L3 and L4 of seen and unseen, with paired 95 %
        intervals over seeds and images. In training: rollouts that are right, and of these the
        ones that name a digit that is not there, with the range over seeds. On unreadable images:
        chains that do so, with 95 % intervals.
    """
    figure = Figure(figsize=(15.5, 7.2), layout="constrained")
    panels = figure.subplots(2, 4)
    for panel, column in zip(panels.T.ravel()[[0, 2, 4, 3, 5]], _COLUMNS, strict=True):
        found = table.entry("accuracy", "grpo", column)
        _lines(panel, _over_grpo(table, column))
        _dress(panel, f"{column} (GRPO: {number(found['mean'])} %)", "points over GRPO", 0)
    made_up = "misread, seen L5"
    _lines(panels[1, 0], lambda method, own: seen.entry("reading", at(method, own), made_up))
    middle = seen.entry("reading", "grpo", made_up)["mean"]
    _dress(panels[1, 0], "unreadable images: digits made up", "% of answers", middle)
    _lines(panels[0, 3], lambda method, own: table.entry("training", at(method, own), _REWARD))
    middle = table.entry("training", "grpo", _REWARD)["mean"]
    _dress(panels[0, 3], "training: rollouts that are right", "%", middle)
    _lines(panels[1, 3], lambda method, own: _poisoned(seen, method, own))
    middle = seen.entry("rollouts", "grpo", "poisoned, clean")["mean"]
    _dress(panels[1, 3], "training: right with a digit made up", "% of right rollouts", middle)
    for panel in panels[1]:
        panel.set_xlabel("highest level of training views")
    styles = [arm_style(method) for method in METHODS]
    handles = [Line2D([], [], color=style.colour, marker=style.marker) for style in styles]
    handles.append(Line2D([], [], color=arm_style("grpo").colour, linestyle="--"))
    labels = [*(style.label for style in styles), "GRPO, no views"]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


_COLUMNS = ("clean", "seen L3", "unseen L3", "seen L4", "unseen L4")


def _over_grpo(table: Table, column: str) -> Callable[[str, float], _Entry | None]:
    """Differences of methods to GRPO."""
    return lambda method, severity: table.entry(
        "difference", at(method, severity), column, against="grpo"
    )


def _poisoned(seen: Table, method: str, severity: float) -> _Entry | None:
    """Of the trained policy's rollouts, on the images that its training samples them on."""
    where = {"naive": f"views to {severity:g}", "roma": "clean"}
    if method not in where:
        return None
    return seen.entry("rollouts", at(method, severity), f"poisoned, {where[method]}")


def _lines(panel: Axes, entry: Callable[[str, float], _Entry | None]) -> None:
    """A line for each method that has entries, with their intervals."""
    for turn, method in enumerate(METHODS):
        shift = _SHIFT * (turn - (len(METHODS) - 1) / 2)
        found = [each for s in SEVERITIES if (each := entry(method, s)) is not None]
        if not found:
            continue
        means, style = [each["mean"] for each in found], arm_style(method)
        below = [each["mean"] - each["low"] for each in found]
        above = [each["high"] - each["mean"] for each in found]
        panel.errorbar(
            [severity + shift for severity in SEVERITIES], means, yerr=[below, above],
            color=style.colour, marker=style.marker, linestyle=style.line,
            linewidth=1.6, elinewidth=1, markersize=6,
        )  # fmt: skip


def _dress(panel: Axes, title: str, unit: str, grpo: float) -> None:
    panel.set_title(title, fontsize=10.5)
    panel.set_ylabel(unit)
    panel.axhline(grpo, color=arm_style("grpo").colour, linewidth=1.4, linestyle="--")
    panel.set_xticks(SEVERITIES, [f"{level:g}" for level in SEVERITIES])
    panel.grid(axis="x", visible=False)


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
