"""The figures of a report, drawn from the report's own numbers: robustness, corruptions, gallery.

Every function returns a `matplotlib.figure.Figure` drawn by Agg, without a window system. Each arm
has one colour, marker and name in all figures. Arms have Okabe and Ito's colours, corruptions Paul
Tol's: both remain distinguishable with the common colour-vision deficiencies. Right and wrong
differ by a sign as well as by colour.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.report.columns import columns_of, hardest_columns
from roma.evaluate.figures import LineStyle, pool_panels, severities, severity_line, styled

ARMS = {
    "base": LineStyle("warm start", "#7a7a7a", "s", ":"),
    "grpo": LineStyle("GRPO", "#0072B2", "o"),
    "grpo_equal_time": LineStyle("GRPO, equal time", "#56B4E9", "D", "--"),
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
_ABREAST = 7  # lines that a panel holds legibly

RIGHT, WRONG = "#00694f", "#b3261e"


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
    return ordered if len(ordered) <= _ABREAST else [a for a in ordered if a not in METHODS]


@styled
def robustness(report: Mapping[str, Any]) -> Figure:
    """Accuracy over severity, a panel per pool: mean over seeds with its interval, seeds as dots.

    Args:
        report: of `experiments.report.report.build_report`; "arms" and "per_seed" are read.

    Returns:
        One row of panels that share the accuracy axis, %.
    """
    arms = few(report["arms"])
    figure, panels = pool_panels(report["arms"][arms[0]])
    for pool, panel in panels.items():
        for position, arm in enumerate(arms):
            style, seeds = arm_style(arm), report["per_seed"][arm]
            # A small sideways shift keeps the intervals of different arms apart.
            shift = 0.045 * (position - (len(arms) - 1) / 2)
            severity_line(panel, report["arms"][arm], pool, style, shift=shift)
            for tree in seeds.values() if len(seeds) > 1 else ():
                means = [entry["mean"] for entry in severities(tree, pool).values()]
                panel.plot(np.arange(len(means)) + shift, means, ".", ms=4, color=style.colour)
                panel.lines[-1].set_alpha(0.45)
    shared_legend(figure, next(iter(panels.values()), None))
    return figure


@styled
def methods(report: Mapping[str, Any], *, minus: str = "grpo") -> Figure:
    """Every arm's accuracy minus GRPO's, with its interval: a panel a column, a line an arm.

    Args:
        report: of `build_report`; "differences" to `minus` are read: mean over seeds, and seeds.
        minus: the arm that the others are compared with.

    Returns:
        Panels side by side for clean images and each pool at its highest level; without
        differences to `minus` an empty figure.
    """
    found = {
        name.removesuffix(f"-{minus}"): by_seed
        for name, by_seed in report["differences"].items()
        if name.endswith(f"-{minus}")
    }
    arms = arm_order(found)
    if not arms:
        return Figure(figsize=(4, 1))
    columns = hardest_columns(found[arms[0]]["mean"])
    figure = Figure(figsize=(3.9 * len(columns), 1.2 + 0.36 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        panel.axvline(0, color="#777777", linewidth=1)
        for line, arm in enumerate(arms):
            style, by_seed = arm_style(arm), found[arm]
            entry = columns_of(by_seed["mean"])[column]
            panel.plot([entry["low"], entry["high"]], [line, line], color=style.colour, lw=2)
            panel.plot(entry["mean"], line, style.marker, color=style.colour, ms=7)
            seeds = [columns_of(t)[column]["mean"] for k, t in by_seed.items() if k != "mean"]
            if len(seeds) > 1:
                panel.plot(seeds, [line] * len(seeds), "|", color=style.colour, ms=8, alpha=0.6)
        panel.set(title=column, xlabel=f"points over {arm_style(minus).label}")
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(arms)), [arm_style(arm).label for arm in arms])
    panels[0].invert_yaxis()
    return figure


def shared_legend(figure: Figure, panel: Axes | None) -> None:
    """The legend of one panel, below all panels."""
    handles, labels = panel.get_legend_handles_labels() if panel else ([], [])
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5)


@styled
def corruptions(report: Mapping[str, Any], *, minus: str = "grpo") -> Figure:
    """Heat maps: each arm's accuracy per corruption at the highest level; ROMA's gain at each.

    Args:
        report: of `build_report`; the rows of "detail" with seed "mean" are read.
        minus: the arm that ROMA is compared with; without either, the lower map is left out.

    Returns:
        The two maps, one above the other, with a number in each cell.
    """
    rows = [row for row in report["detail"] if row["seed"] == "mean" and row["corruption"]]
    value = {(row["arm"], row["corruption"], row["level"]): row["mean"] for row in rows}
    pool_of = {row["corruption"]: row["pool"] for row in rows}
    kinds = {kind: f"{kind.replace('_', chr(10))}\n({pool})" for kind, pool in pool_of.items()}
    arms, levels = arm_order({row["arm"]: 0 for row in rows}), sorted({r["level"] for r in rows})
    if not rows:
        return Figure(figsize=(4, 1))
    compare = {"roma", minus} <= set(arms) and minus != "roma"
    heights = [len(arms), len(levels)] if compare else [len(arms)]
    size = (2.2 + 1.05 * len(kinds), 2.0 * len(heights) + 0.4 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    table = np.array([[value[arm, kind, levels[-1]] for kind in kinds] for arm in arms])
    _heat_map(panels[0], table, "{:.1f}", "viridis", (float(table.min()), float(table.max())))
    panels[0].set_yticks(range(len(arms)), [arm_style(arm).label for arm in arms])
    panels[0].set_title(f"Accuracy at L{levels[-1]}, %, mean over seeds")
    if compare:
        gain = np.array(
            [[value["roma", k, lv] - value[minus, k, lv] for k in kinds] for lv in levels]
        )
        limit = max(1.0, float(np.abs(gain).max()))
        _heat_map(panels[1], gain, "{:+.1f}", "PuOr_r", (-limit, limit))
        panels[1].set_yticks(range(len(levels)), [f"L{level}" for level in levels])
        panels[1].set_title(f"ROMA − {arm_style(minus).label}, percentage points")
    for panel in panels:
        panel.set_xticks(range(len(kinds)), kinds.values(), fontsize=9)
    return figure


def _heat_map(
    panel: Axes, table: NDArray[np.float64], form: str, colours: str, limits: tuple[float, float]
) -> None:
    """A map with its numbers, in black or white for contrast with the cell's colour."""
    drawn = panel.imshow(table, cmap=colours, aspect="auto", vmin=limits[0], vmax=limits[1])
    for row, column in np.ndindex(*table.shape):
        red, green, blue, _ = drawn.cmap(drawn.norm(table[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5  # ITU-R BT.601 luma
        text = form.format(table[row, column]).replace("-", "−")
        panel.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.grid(visible=False)


@dataclass(frozen=True)
class GalleryItem:
    """One test image, clean and degraded, and what each arm answered.

    question, truth: the problem without its image mark, and the right answer.
    condition: of the degraded image, e.g. "jpeg L3".
    clean, degraded: [H, W, 3] uint8.
    answers: arm → "clean" and "degraded" → (answer in short, whether it is right).
    """

    question: str
    truth: str
    condition: str
    clean: NDArray[np.uint8]
    degraded: NDArray[np.uint8]
    answers: Mapping[str, Mapping[str, tuple[str, bool]]]


@styled
def gallery(items: Sequence[GalleryItem]) -> Figure:
    """Test images, clean and degraded, with each arm's answer under them: ✓ right, ✗ wrong.

    Args:
        items: of `experiments.report.report.choose_gallery`.

    Returns:
        Three items a row.
    """
    columns = min(3, max(1, len(items)))
    lines = -(-max(1, len(items)) // columns)
    arms = max([len(item.answers) for item in items], default=1)
    figure = Figure(figsize=(5.6 * columns, (1.9 + 0.2 * arms) * lines), layout="constrained")
    boxes = figure.subfigures(lines, columns, squeeze=False, wspace=0.06, hspace=0.03).ravel()
    for box, item in zip(boxes, items, strict=False):
        panels = box.subplots(2, 2, height_ratios=[1.25, 0.2 * arms])
        box.suptitle(f"{item.question}   (truth: {item.truth})", fontsize=10.5, weight="bold")
        shown = {"clean": ("clean", item.clean), "degraded": (item.condition, item.degraded)}
        for column, (where, (name, image)) in enumerate(shown.items()):
            picture, below = panels[:, column]
            picture.imshow(image, interpolation="nearest")
            picture.set_title(name.replace("_", " "), fontsize=10, weight="normal", loc="center")
            picture.set_axis_off()
            below.set_axis_off()
            for line, arm in enumerate(arm_order(item.answers)):
                if where in item.answers[arm]:
                    text, good = item.answers[arm][where]
                    label = "" if column else f"{arm_style(arm).label}: "
                    said = f"{'✓' if good else '✗'} {label}{text}"
                    y = 1 - (line + 0.5) / arms
                    below.text(0, y, said, va="center", fontsize=8, color=RIGHT if good else WRONG)
    return figure
