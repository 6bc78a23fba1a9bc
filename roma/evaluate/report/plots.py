"""Figures of reports: accuracy over severity, differences, heat maps, test images with answers.

Every function returns a `matplotlib.figure.Figure` drawn by Agg, without a window system. A model
has one colour, marker and name in all figures of a report. Right and wrong differ by a sign as well
as by colour.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from roma.evaluate.figures import (
    RIGHT,
    WRONG,
    LineStyle,
    pool_panels,
    severities,
    severity_line,
    styled,
)
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.wording import short

_MODELS = (
    ("#0072B2", "o"),
    ("#D55E00", "P"),
    ("#009E73", "^"),
    ("#E69F00", "v"),
    ("#56B4E9", "D"),
    ("#CC79A7", "<"),
    ("#7a7a7a", "s"),
)
"""Okabe and Ito's colours, distinguishable with the common colour-vision deficiencies."""

ABREAST = len(_MODELS)
"""Lines that a panel holds legibly."""


def styles_of(models: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each model, in their order; the eighth has the first one's colour, dashed.

    Example:
        >>> styles_of(["mine", "theirs"])["theirs"].colour
        '#D55E00'
    """
    dashes = ("-", "--", ":")
    return {
        model: LineStyle(
            _legend_name(model), *_MODELS[turn % ABREAST], dashes[turn // ABREAST % len(dashes)]
        )
        for turn, model in enumerate(models)
    }


def _legend_name(model: str) -> str:
    """In short; a legend leaves out what starts with an underscore."""
    name = short(model)
    return f" {name}" if name.startswith("_") else name


@styled
def severity(
    trees: Mapping[str, Mapping[str, Any]],
    styles: Mapping[str, LineStyle],
    seeds: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Figure:
    """Accuracy over severity, a panel per pool and a line per model, with intervals.

    Args:
        trees: model → pool → level → entry.
        styles: of each model.
        seeds: model → a tree for each of several training seeds, drawn as dots.

    Returns:
        One row of panels that share the accuracy axis, %.
    """
    figure, panels = pool_panels(*trees.values())
    for pool, (panel, names) in panels.items():
        for position, (model, tree) in enumerate(trees.items()):
            # A small sideways shift keeps the intervals of different models apart.
            shift = 0.045 * (position - (len(trees) - 1) / 2)
            severity_line(panel, tree, pool, names, styles[model], shift=shift)
            own = (seeds or {}).get(model, ())
            for single in own if len(own) > 1 else ():
                means = {name: entry["mean"] for name, entry in severities(single, pool).items()}
                places = np.array([names.index(name) for name in means]) + shift
                panel.plot(places, [*means.values()], ".", ms=4, color=styles[model].colour)
                panel.lines[-1].set_alpha(0.45)
    shared_legend(figure, next((panel for panel, _ in panels.values()), None))
    return figure


@styled
def each_corruption(
    details: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, LineStyle]
) -> Figure:
    """Accuracy over severity, a panel per corruption and a line per model.

    Args:
        details: model → rows of a summary's "detail"; the clean one starts each line.
        styles: of each model.
    """
    every = [row for rows in details.values() for row in rows]
    kinds = {row["corruption"]: row["pool"] for row in every if row["corruption"]}
    # The panels share their axis.
    levels = sorted({row["level"] for row in every} - {0})
    names = ["clean"] * any(not row["level"] for row in every) + [f"L{level}" for level in levels]
    columns = min(5, max(1, len(kinds)))
    lines = -(-max(1, len(kinds)) // columns)
    size = (2.5 * columns + 0.6, 2.3 * lines + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (kind, pool) in zip(panels, kinds.items(), strict=False):
        trees = {model: _of_kind(rows, kind, pool) for model, rows in details.items()}
        for model, tree in trees.items():
            severity_line(panel, tree, pool, names, styles[model], bars=False)
        panel.set_xticks(range(len(names)), names, fontsize=8.5)
        panel.set_title(f"{short(kind.replace('_', ' '))}\n{short(pool)}", fontsize=9)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    for panel in panels[: len(kinds)][-columns:]:  # the last of its column, whatever its row
        panel.tick_params(labelbottom=True)
    for panel in panels[::columns]:
        panel.set_ylabel("accuracy, %", fontsize=9)
    shared_legend(figure, panels[0])
    return figure


def _of_kind(rows: Sequence[Mapping[str, Any]], kind: str, pool: str) -> dict[str, Any]:
    """A model's rows of clean images and of one corruption, as a tree."""
    clean = [("clean", row) for row in rows if not row["level"]]
    levels = {f"L{row['level']}": row for row in rows if row["corruption"] == kind}
    return dict(clean) | {pool: levels}


Mark = tuple[LineStyle, Mapping[str, float], Sequence[float]]
"""One interval of `beside`: its style, its entry, and single means (of seeds) drawn as strokes."""


@styled
def beside(
    rows: Mapping[str, Mapping[str, Sequence[Mark]]], unit: str, *, zero: bool = False
) -> Figure:
    """Means with their intervals as lines: a panel per column, a line per row.

    Args:
        rows: label → column → the marks that share the line; a row may lack a column.
        unit: below each panel.
        zero: draw a line at 0, for differences.

    Returns:
        Panels side by side, on one scale; an empty figure where there is no row.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        return Figure(figsize=(4, 1))
    most = max(len(marks) for row in rows.values() for marks in row.values())
    apart = 0.72 / most
    height = 1.2 + max(0.36, 0.16 * most) * len(rows)
    figure = Figure(figsize=(3.9 * len(columns), height), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        if zero:
            panel.axvline(0, color="#777777", linewidth=1)
        for line, row in enumerate(rows.values()):
            marks = row.get(column, ())
            for turn, (style, entry, singles) in enumerate(marks):
                y = line + apart * (turn - (len(marks) - 1) / 2)
                panel.plot([entry["low"], entry["high"]], [y, y], color=style.colour, lw=2)
                panel.plot(
                    entry["mean"], y, style.marker, color=style.colour, ms=7 if most == 1 else 5,
                    label="" if line else style.label,
                )  # fmt: skip
                if len(singles) > 1:
                    panel.plot(singles, [y] * len(singles), "|", color=style.colour, ms=8)
                    panel.lines[-1].set_alpha(0.6)
        panel.set(title=column, xlabel=unit)
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(rows)), [short(label) for label in rows])
    panels[0].invert_yaxis()
    if most > 1:
        shared_legend(figure, panels[0])
    return figure


def shared_legend(figure: Figure, panel: Axes | None) -> None:
    """The legend of one panel, below all panels."""
    handles, labels = panel.get_legend_handles_labels() if panel else ([], [])
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))


def heat_map(
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


@styled
def gallery(items: Sequence[GalleryItem], style: Callable[[str], LineStyle]) -> Figure:
    """Test images, clean and degraded, with each model's answer under them: ✓ right, ✗ wrong.

    Args:
        items: their models are listed in the order of `answers`.
        style: of a model.

    Returns:
        Three items a row.
    """
    columns = min(3, max(1, len(items)))
    lines = -(-max(1, len(items)) // columns)
    models = max([len(item.answers) for item in items], default=1)
    figure = Figure(figsize=(5.6 * columns, (1.9 + 0.2 * models) * lines), layout="constrained")
    boxes = figure.subfigures(lines, columns, squeeze=False, wspace=0.06, hspace=0.03).ravel()
    for box, item in zip(boxes, items, strict=False):
        panels = box.subplots(2, 2, height_ratios=[1.25, 0.2 * models])
        asked = f"{short(item.question, width=44)}   (truth: {short(item.truth)})"
        box.suptitle(asked, fontsize=10.5, weight="bold")
        shown = {"clean": ("clean", item.clean), "degraded": (item.condition, item.degraded)}
        for column, (where, (name, image)) in enumerate(shown.items()):
            picture, below = panels[:, column]
            if image is not None:
                picture.imshow(image, interpolation="nearest")
            picture.set_title(name.replace("_", " "), fontsize=10, weight="normal", loc="center")
            picture.set_axis_off()
            below.set_axis_off()
            for line, (model, answers) in enumerate(item.answers.items()):
                if where in answers:
                    text, good = answers[where]
                    label = "" if column else f"{style(model).label}: "
                    said = f"{'✓' if good else '✗'} {label}{short(text, width=44)}"
                    y = 1 - (line + 0.5) / models
                    below.text(0, y, said, va="center", fontsize=8, color=RIGHT if good else WRONG)
    return figure
