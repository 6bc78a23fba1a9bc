"""The figures of a comparison, drawn from its report's own numbers: robustness, corruptions.

Every function returns a `matplotlib.figure.Figure` drawn by Agg, without a window system. Each arm
has one colour, marker and name in all figures. Arms have Okabe and Ito's colours, corruptions Paul
Tol's: both remain distinguishable with the common colour-vision deficiencies.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.columns import compared_in, only
from roma.evaluate.figures import LineStyle, styled
from roma.evaluate.report import plots

ARMS = {
    "base": LineStyle("warm start", "#7a7a7a", "s", ":"),
    "grpo": LineStyle("GRPO", "#0072B2", "o"),
    "grpo_equal_time": LineStyle("GRPO, equal time", "#56B4E9", "D", "--"),
    "naive_mild": LineStyle("naive augmentation, mild views", "#7CC48D", "p", "--"),
    "naive": LineStyle("naive augmentation", "#009E73", "^"),
    "roma": LineStyle("ROMA", "#D55E00", "P"),
}
"""The arms of every demo → style, in the order of tables and legends."""

METHODS = {
    "mssr": LineStyle("MSSR", "#E69F00", "v"),
    "srpo": LineStyle("SRPO", "#CC79A7", "<"),
    "vgpo": LineStyle("VGPO", "#882255", ">"),
    "papo": LineStyle("PAPO", "#999933", "h"),
    "noisyrollout": LineStyle("NoisyRollout", "#44AA99", "X"),
    "dvrp": LineStyle("DVRP", "#332288", "d"),
    "mssr_roma": LineStyle("MSSR + ROMA", "#8a5a00", "v", "--"),
    "srpo_roma": LineStyle("SRPO + ROMA", "#7d3a62", "<", "--"),
    "vgpo_roma": LineStyle("VGPO + ROMA", "#4a0f2e", ">", "--"),
}
"""The arms of methods → style, in that order, after those of every demo."""

_KNOWN = ARMS | METHODS
_WIDEST = 14.0  # inches: on a page the letters of a wider figure are too small


def arm_style(arm: str) -> LineStyle:
    """The style of a known arm; of another, a black line with the arm's name."""
    return _KNOWN.get(arm, LineStyle(arm, "#222222"))


def arm_order(arms: Iterable[str]) -> list[str]:
    """Known arms first, in the order of `ARMS` and `METHODS`; then the others, as given.

    Example:
        >>> arm_order(["roma", "mine", "base"])
        ['base', 'roma', 'mine']
    """
    given = list(arms)
    return [arm for arm in _KNOWN if arm in given] + [arm for arm in given if arm not in _KNOWN]


def few(arms: Iterable[str]) -> list[str]:
    """In order; where they are more than a panel holds, those of every demo alone."""
    ordered = arm_order(arms)
    return ordered if len(ordered) <= plots.ABREAST else [a for a in ordered if a not in METHODS]


@styled
def robustness(report: Mapping[str, Any]) -> Figure:
    """Accuracy over severity, a panel per pool: mean over seeds with its interval, seeds as dots.

    Args:
        report: of `experiments.report.report.build_report`; "arms", "per_seed" and "trained_to" are
            read.

    Returns:
        One row of panels that share the accuracy axis, %. A band marks the levels up to
        "trained_to", where the report has it.
    """
    arms = few(report["arms"])
    figure = plots.severity(
        {arm: report["arms"][arm] for arm in arms},
        {arm: arm_style(arm) for arm in arms},
        {arm: list(report["per_seed"][arm].values()) for arm in arms},
    )
    if report.get("trained_to") is not None:
        for panel in figure.axes:
            _range_of_training(panel, report["trained_to"])
    if figure.legends and len(arms) > 5:  # the sixth alone would have a line of its own
        figure.legends[0].remove()
        names = figure.axes[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=-(-len(arms) // 2))
    return figure


def _range_of_training(panel: Axes, trained_to: float) -> None:
    """A band over the levels up to this one; severities stand at 0, 1, … of the panel's axis."""
    names = [label.get_text() for label in panel.get_xticklabels()]
    levels = [0.0 if name == "clean" else float(name[1:]) for name in names]
    end, left = float(np.interp(trained_to, levels, range(len(levels)))), panel.get_xlim()[0]
    panel.axvspan(left, end, color="#f1f1ee", linewidth=0, zorder=0)
    panel.axvline(end, color="#9a9a94", linewidth=1, linestyle=":", zorder=1)
    panel.set_xlim(left=left)
    said = f"training: seen corruptions up to level {trained_to:g} "
    across = panel.get_xaxis_transform()  # in levels, and from the bottom of the panel to its top
    panel.text(end, 0.02, said, transform=across, ha="right", va="bottom", fontsize=9, color="#666")


def methods(report: Mapping[str, Any], *, minus: str = "grpo") -> Figure:
    """Every arm's accuracy minus GRPO's, with its interval: a panel a column, a line an arm.

    Args:
        report: of `build_report`; "differences" to `minus` are read: mean over seeds, and seeds.
        minus: the arm that the others are compared with.

    Returns:
        Panels side by side for clean images and each pool at its compared levels; without
        differences to `minus` an empty figure.
    """
    found = {
        name.removesuffix(f"-{minus}"): by_seed
        for name, by_seed in report["differences"].items()
        if name.endswith(f"-{minus}")
    }
    trained_to = report.get("trained_to")
    rows = {arm_style(arm).label: _marks(arm, found[arm], trained_to) for arm in arm_order(found)}
    figure = plots.beside(rows, f"points over {arm_style(minus).label}", zero=True)
    width, height = figure.get_size_inches()
    figure.set_size_inches(min(width, _WIDEST), height)
    return figure


def _marks(
    arm: str, by_seed: Mapping[str, Any], trained_to: float | None
) -> dict[str, list[plots.Mark]]:
    """Column → the arm's mean over seeds with its interval, and the seeds' own means."""
    seeds = [only(tree, trained_to) for seed, tree in by_seed.items() if seed != "mean"]
    return {
        column: [(arm_style(arm), entry, [seed[column]["mean"] for seed in seeds])]
        for column, entry in only(by_seed["mean"], trained_to).items()
    }


@styled
def corruptions(report: Mapping[str, Any], *, minus: str = "grpo") -> Figure:
    """Heat maps: each arm's accuracy per corruption at the compared levels; ROMA's gain at each.

    Args:
        report: of `build_report`; the rows of "detail" with seed "mean" are read.
        minus: the arm that ROMA is compared with; without either, the lowest map is left out.

    Returns:
        The maps, one above the other, with a number in each cell.
    """
    rows = [row for row in report["detail"] if row["seed"] == "mean" and row["corruption"]]
    value = {(row["arm"], row["corruption"], row["level"]): row["mean"] for row in rows}
    pool_of = {row["corruption"]: row["pool"] for row in rows}
    kinds = {kind: f"{kind.replace('_', chr(10))}\n({pool})" for kind, pool in pool_of.items()}
    arms, levels = arm_order({row["arm"]: 0 for row in rows}), sorted({r["level"] for r in rows})
    if not rows:
        return Figure(figsize=(4, 1))
    compare = {"roma", minus} <= set(arms) and minus != "roma"
    named = [column.rpartition(" L")[2] for part in compared_in(report) for column in part]
    shown = sorted({int(level) for level in named if level.isdigit()})
    heights = [len(arms)] * len(shown) + [len(levels)] * compare
    size = (2.2 + 1.05 * len(kinds), 2.0 * len(heights) + 0.4 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, level in zip(panels, shown, strict=False):
        table = np.array([[value[arm, kind, level] for kind in kinds] for arm in arms])
        limits = float(table.min()), float(table.max())
        plots.heat_map(panel, table, "{:.1f}", "viridis", limits)
        panel.set_yticks(range(len(arms)), [arm_style(arm).label for arm in arms])
        panel.set_title(f"Accuracy at L{level}, %, mean over seeds")
    if compare:
        gain = np.array(
            [[value["roma", k, lv] - value[minus, k, lv] for k in kinds] for lv in levels]
        )
        limit = max(1.0, float(np.abs(gain).max()))
        plots.heat_map(panels[-1], gain, "{:+.1f}", "PuOr_r", (-limit, limit))
        panels[-1].set_yticks(range(len(levels)), [f"L{level}" for level in levels])
        panels[-1].set_title(f"ROMA − {arm_style(minus).label}, percentage points")
    for panel in panels:
        panel.set_xticks(range(len(kinds)), kinds.values(), fontsize=9)
    return figure
