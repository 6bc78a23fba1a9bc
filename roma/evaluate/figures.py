"""The figure of an evaluation, and its parts that other figures share.

Every function returns a `matplotlib.figure.Figure` drawn by Agg, without a window system.
Corruptions have Paul Tol's colours, distinguishable with the common colour-vision deficiencies.
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


@dataclass(frozen=True)
class LineStyle:
    """Label, colour, marker and dashes of a line."""

    label: str
    colour: str
    marker: str = "o"
    line: str = "-"


KINDS = "#332288 #999933 #88CCEE #AA4499 #117733 #CC6677 #44AA99 #DDCC77 #882255".split()
"""Colours of corruptions, in order; the tenth has the first one's again."""

RIGHT, WRONG = "#00694f", "#b3261e"
"""Colours of answers, beside ✓ and ✗."""

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
    "text.parse_math": False,  # a name may hold a dollar sign
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


@styled
def one_model(summary: Mapping[str, Any]) -> Figure:
    """Accuracy of one model over severity, a panel per pool: macro average, and each corruption.

    Args:
        summary: of `roma.evaluate.summary.summarise`.

    Returns:
        One row of panels that share the accuracy axis, %.
    """
    figure, panels = pool_panels(summary["pools"])
    for pool, (panel, names) in panels.items():
        rows = [row for row in summary["detail"] if row["pool"] == pool]
        for turn, kind in enumerate(dict.fromkeys(row["corruption"] for row in rows)):
            levels = {f"L{row['level']}": row for row in rows if row["corruption"] == kind}
            tree = {pool: levels} | {p: e for p, e in summary["pools"].items() if p == "clean"}
            style = LineStyle(kind.replace("_", " "), KINDS[turn % len(KINDS)], ".")
            severity_line(panel, tree, pool, names, style, bars=False)
        average = LineStyle("macro average", "#000000")
        severity_line(panel, summary["pools"], pool, names, average)
        panel.legend(fontsize=9)
    return figure


def pool_panels(*trees: Mapping[str, Any]) -> tuple[Figure, dict[str, tuple[Axes, list[str]]]]:
    """A figure with one panel for each pool of any tree that has levels; pool → panel, severities.

    What only some of the trees have has its place as well, so that equal severities are one place.
    """
    pools = list(dict.fromkeys(pool for tree in trees for pool in tree if pool != "clean"))
    count = max(1, len(pools))
    figure = Figure(figsize=(5.4 * count, 4.6), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    names = [severities_of(trees, pool) for pool in pools]
    for panel, pool, own in zip(axes, pools, names, strict=False):
        panel.set_xticks(range(len(own)), own)
        panel.set(title=f"{pool} corruptions", xlabel="severity")
        panel.grid(axis="x", visible=False)
    axes[0].set_ylabel("accuracy, %")
    return figure, dict(zip(pools, zip(axes, names, strict=False), strict=True))


def severities(tree: Mapping[str, Any], pool: str) -> dict[str, Mapping[str, float]]:
    """Severity ("clean" where it was measured, "L1", "L2", …) → entry."""
    return ({"clean": tree["clean"]} if "clean" in tree else {}) | tree.get(pool, {})


def severities_of(trees: Iterable[Mapping[str, Any]], pool: str) -> list[str]:
    """The severities of any tree: "clean", then the levels from the mildest.

    Example:
        >>> severities_of([{"seen": {"L3": {}}}, {"clean": {}, "seen": {"L1": {}}}], "seen")
        ['clean', 'L1', 'L3']
    """
    found = {name for tree in trees for name in severities(tree, pool)}
    return sorted(found, key=lambda name: 0 if name == "clean" else int(name[1:]))


def severity_line(
    panel: Axes,
    tree: Mapping[str, Any],
    pool: str,
    names: Sequence[str],
    style: LineStyle,
    *,
    shift: float = 0.0,
    bars: bool = True,
) -> None:
    """Accuracy over severity as a line, with its intervals as bars; `names` are the panel's."""
    found = severities(tree, pool)
    entries = [found[name] for name in names if name in found]
    mean, low, high = (np.array([e[key] for e in entries]) for key in ("mean", "low", "high"))
    panel.errorbar(
        np.flatnonzero([name in found for name in names]) + shift,
        mean,
        # A stored percentile interval may exclude the mean: no negative bar.
        yerr=np.maximum(0, [mean - low, high - mean]) if bars else None,
        label=style.label,
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        linewidth=1.9 if bars else 1.2,
        elinewidth=1.1,
        capsize=2.5,
    )
