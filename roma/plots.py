"""The figures of a report, drawn from the report's own numbers: robustness, corruptions, gallery.

Every function returns a `matplotlib.figure.Figure` that no window system knows of (Agg draws it),
and each arm has one colour, marker and name throughout. Arms have Okabe and Ito's colours, kinds of
corruption Paul Tol's: both stay apart under the common colour-vision deficiencies. Right and wrong
differ by a sign as well as by colour.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is named and drawn, in figures and tables alike."""

    label: str
    colour: str
    marker: str = "o"
    line: str = "-"


ARMS = {
    "base": ArmStyle("warm start", "#7a7a7a", "s", ":"),
    "grpo": ArmStyle("GRPO", "#0072B2", "o"),
    "grpo_equal_time": ArmStyle("GRPO, equal time", "#56B4E9", "D", "--"),
    "naive": ArmStyle("naive augmentation", "#009E73", "^"),
    "roma": ArmStyle("ROMA", "#D55E00", "P"),
}
"""Arm → style, in the order of tables and legends."""

RIGHT, WRONG = "#00694f", "#b3261e"
KINDS = "#332288 #999933 #88CCEE #AA4499 #117733 #CC6677 #44AA99 #DDCC77 #882255".split()
"""Colours of corruptions, in turn."""

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
_Parameters = ParamSpec("_Parameters")


def styled(draw: Callable[_Parameters, Figure]) -> Callable[_Parameters, Figure]:
    """Runs `draw` under this module's style without touching the caller's."""

    @functools.wraps(draw)
    def wrapper(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file of 150 dots per inch and returns its path."""
    figure.savefig(path, dpi=150)
    return path


def arm_style(arm: str) -> ArmStyle:
    """The style of a known arm, or a plain black one under the arm's own name."""
    return ARMS.get(arm, ArmStyle(arm, "#222222"))


def arm_order(arms: Iterable[str]) -> list[str]:
    """Known arms first, in the order of `ARMS`; others after them, as they come.

    Example:
        >>> arm_order(["roma", "mine", "base"])
        ['base', 'roma', 'mine']
    """
    given = list(arms)
    return [arm for arm in ARMS if arm in given] + [arm for arm in given if arm not in ARMS]


@styled
def robustness(report: Mapping[str, Any]) -> Figure:
    """Accuracy over severity, a panel per pool: mean over seeds with its interval, seeds as dots.

    Args:
        report: of `roma.report.build_report`; "arms" and "per_seed" are read.

    Returns:
        One row of panels that share the accuracy axis, %.
    """
    arms = arm_order(report["arms"])
    figure, panels = _pool_panels(report["arms"][arms[0]])
    for pool, panel in panels.items():
        for position, arm in enumerate(arms):
            style, seeds = arm_style(arm), report["per_seed"][arm]
            # A small sideways shift keeps the intervals of different arms apart.
            shift = 0.045 * (position - (len(arms) - 1) / 2)
            _severity_line(panel, report["arms"][arm], pool, style, shift=shift)
            for tree in seeds.values() if len(seeds) > 1 else ():
                means = [entry["mean"] for entry in _severities(tree, pool).values()]
                panel.plot(np.arange(len(means)) + shift, means, ".", ms=4, color=style.colour)
                panel.lines[-1].set_alpha(0.45)
    shared_legend(figure, next(iter(panels.values()), None))
    return figure


@styled
def one_model(summary: Mapping[str, Any]) -> Figure:
    """Accuracy of one model over severity, a panel per pool: macro average, and each corruption.

    Args:
        summary: of `roma.evaluate.summarise`.

    Returns:
        One row of panels that share the accuracy axis, %.
    """
    figure, panels = _pool_panels(summary["pools"])
    for pool, panel in panels.items():
        rows = [row for row in summary["detail"] if row["pool"] == pool]
        for turn, kind in enumerate(dict.fromkeys(row["corruption"] for row in rows)):
            levels = {f"L{row['level']}": row for row in rows if row["corruption"] == kind}
            tree = {pool: levels} | {p: e for p, e in summary["pools"].items() if p == "clean"}
            style = ArmStyle(kind.replace("_", " "), KINDS[turn % len(KINDS)], ".")
            _severity_line(panel, tree, pool, style, bars=False)
        _severity_line(panel, summary["pools"], pool, ArmStyle("macro average", "#000000"))
        panel.legend(fontsize=9)
    return figure


def _pool_panels(tree: Mapping[str, Any]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel for each pool of `tree` that has levels."""
    pools = [pool for pool in tree if pool != "clean"]
    count = max(1, len(pools))
    figure = Figure(figsize=(5.4 * count, 4.6), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for panel, pool in zip(axes, pools, strict=False):
        severities = _severities(tree, pool)
        panel.set_xticks(range(len(severities)), severities)
        panel.set(title=f"{pool} corruptions", xlabel="severity")
        panel.grid(axis="x", visible=False)
    axes[0].set_ylabel("accuracy, %")
    return figure, dict(zip(pools, axes, strict=False))


def _severities(tree: Mapping[str, Any], pool: str) -> dict[str, Mapping[str, float]]:
    """Severity ("clean" where it was measured, "L1", "L2", …) → entry."""
    return ({"clean": tree["clean"]} if "clean" in tree else {}) | tree[pool]


def _severity_line(
    panel: Axes,
    tree: Mapping[str, Any],
    pool: str,
    style: ArmStyle,
    *,
    shift: float = 0.0,
    bars: bool = True,
) -> None:
    """Accuracy over severity as a line, with its intervals as bars."""
    entries = _severities(tree, pool).values()
    mean, low, high = (np.array([e[key] for e in entries]) for key in ("mean", "low", "high"))
    panel.errorbar(
        np.arange(len(mean)) + shift,
        mean,
        # A percentile interval may, by its granularity, miss the mean by a hair: no negative bar.
        yerr=np.maximum(0, [mean - low, high - mean]) if bars else None,
        label=style.label,
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        linewidth=1.9 if bars else 1.2,
        elinewidth=1.1,
        capsize=2.5,
    )


def shared_legend(figure: Figure, panel: Axes | None) -> None:
    """The legend of one panel, below all panels."""
    handles, labels = panel.get_legend_handles_labels() if panel else ([], [])
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=5)


@styled
def corruptions(report: Mapping[str, Any], *, minus: str = "grpo") -> Figure:
    """Heat maps: each arm's accuracy per corruption at the highest level; ROMA's gain at each.

    Args:
        report: of `roma.report.build_report`; the rows of "detail" with seed "mean" are read.
        minus: the arm that ROMA is compared with; without either, the lower map is left out.

    Returns:
        One map above the other, each cell with its number.
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
    """A map with its numbers, in black or white, whichever reads better on the cell's colour."""
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
        items: of `roma.report.choose_gallery`.

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
