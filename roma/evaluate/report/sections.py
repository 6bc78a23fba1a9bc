"""The page of an evaluation: its sections, from the content and the figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape

import yaml

from roma.evaluate.figures import LineStyle
from roma.evaluate.report.cards import GalleryItem, cards
from roma.evaluate.report.content import MEASURES, Content, Summary, column, corruptions
from roma.evaluate.report.findings import CAVEAT, findings, opening
from roma.evaluate.report.page import (
    Section,
    bullets,
    folded,
    heading,
    named,
    note,
    picture,
    render,
    shade,
)
from roma.evaluate.report.plots import ABREAST
from roma.evaluate.report.tables import Block, Form, Row, difference_form, share_form, table
from roma.evaluate.wording import Entry, direction, number

_ACCURACY = (
    "Share of right answers; 95 % interval below. A pool at a level is the macro average over its"
    " corruptions, an average over benchmarks gives each the same weight."
)
_DIFFERENCES = (
    "Accuracy minus that of {against}, points, on the same questions. Coloured where the interval"
    " excludes 0: blue if better than {against}, red if worse."
)
_FIGURE = "Shown: {part}. Macro averages over corruptions; bars: 95 % interval."
_OVERLAP = (
    " Overlapping bars do not compare two models, which share the questions: see the differences."
)
_CORRUPTIONS = "Accuracy, %: the darker, the lower, over all of a table."
_GALLERY = (
    "Chosen because an answer flips from right on the clean image to wrong on the degraded one: no"
    " fair sample. ✓ right, ✗ wrong."
)
_INTERVALS = (
    "How the intervals are made, and what each column's formula is: docs/EVALUATION.md of the"
    " package."
)
_RANGE = 30.0  # points that a heat map spans at least

Label = Callable[[str], str]
"""A model's name as HTML."""


def page_of(
    content: Content,
    figures: Mapping[str, bytes],
    styles: Mapping[str, LineStyle],
    gallery: Sequence[GalleryItem] = (),
) -> str:
    """The whole page as HTML.

    Args:
        content: what was measured.
        figures: name → PNG file, of `roma.evaluate.report.write.draw`.
        styles: of each model.
        gallery: questions whose answer flips; none: no such section.
    """

    def label(model: str) -> str:
        return named(model, styles[model].colour)

    def drawn(*names: str) -> str:
        return "".join(picture(figures[name], name) for name in names if name in figures)

    accuracy = _by_part(content.parts, "accuracy", label, share_form)
    body = [
        Section("accuracy", "Accuracy, %", note(_ACCURACY) + accuracy),
    ]
    part = next(iter(content.parts))
    if "severity" in figures:
        said = _FIGURE.format(part=part) + _OVERLAP * bool(content.differences)
        if len(content.models) > ABREAST:
            said += f" Figures show the first {ABREAST} of {len(content.models)} models."
        body.append(Section("severity", "Accuracy over severity", note(said) + drawn("severity")))
    if "benchmarks" in figures:
        body.append(Section("benchmarks", "Benchmark by benchmark", drawn("benchmarks")))
    if content.differences:
        said = note(_DIFFERENCES.format(against=content.against)) + drawn("differences")
        shown = said + _differences(content, label)
        body.append(Section("differences", "Paired differences", shown))
    if robustness := _robustness(content, label):
        body.append(Section("robustness", "Robustness", robustness))
    if kinds := _corruptions(content):
        shown = drawn("corruptions") + note(_CORRUPTIONS) + kinds
        body.append(Section("corruptions", "Each corruption", shown))
    if gallery:
        shown = note(_GALLERY) + cards(gallery, styles.__getitem__)
        body.append(Section("gallery", "Answers that flip", shown))
    body.append(Section("settings", "Settings", _settings(content)))
    return render(
        content.title,
        opening=opening(content),
        findings=findings(content),
        notes=content.notes,
        caveat=CAVEAT,
        sections=body,
        footer="The same tables stand in the Markdown file beside this page.",
    )


def _rows(summaries: Mapping[str, Summary], name: str, label: Label) -> list[Row]:
    """A row for each model that has the column."""
    found = {model: column(summary, name) for model, summary in summaries.items()}
    return [Row(label(model), tree) for model, tree in found.items() if tree]


def _by_part(
    parts: Mapping[str, Mapping[str, Summary]], name: str, label: Label, form: Form
) -> str:
    """A column: a row per benchmark for one model, else a block of models per benchmark.

    Empty where it was not measured.
    """
    (first, *others) = dict.fromkeys(model for own in parts.values() for model in own)
    if others:
        blocks = [
            Block(_rows(summaries, name, label), escape(part) if len(parts) > 1 else "")
            for part, summaries in parts.items()
        ]
    else:
        trees = {part: column(own[first], name) for part, own in parts.items()}
        blocks = [Block([Row(escape(part), tree) for part, tree in trees.items() if tree])]
    if not any(block.rows for block in blocks):
        return ""
    return table(blocks, ("model" if others else "benchmark",), form)


def _differences(content: Content, label: Label) -> str:
    """Tables of accuracy and of each column that was compared."""
    whose = [f"{model} minus {content.against}" for model in content.differences]
    tables = note(f"{whose[0]}.") if len(whose) == 1 else ""
    tables += _by_part(content.differing, "accuracy", label, difference_form)
    for name, meaning in MEASURES.items():
        form = _drop_form if name == "drop" else difference_form
        if found := _by_part(content.differing, name, label, form):
            tables += heading(f"Difference of {meaning}") + found
    return tables


def _robustness(content: Content, label: Label) -> str:
    """A table per benchmark: a row per column for one model, else a block of models per column."""
    tables, alone = "", len(content.models) == 1
    for part, summaries in content.parts.items():
        blocks = []
        for name, meaning in MEASURES.items():
            form = _drop_form if name == "drop" else share_form
            rows = _rows(summaries, name, label)
            if alone:
                rows = [replace(row, label=escape(meaning)) for row in rows]
            if rows:
                blocks.append(Block(rows, "" if alone else escape(meaning), form))
        if blocks:
            tables += heading(part) if len(content.parts) > 1 else ""
            tables += table(blocks, ("" if alone else "model",), share_form)
    return tables


def _drop_form(entry: Entry) -> tuple[str, str]:
    """A loss in points: red where it is one, blue where degradation helps."""
    turned = {"up": "down", "down": "up", "": ""}
    return turned[direction(entry)], difference_form(entry)[1]


def _corruptions(content: Content) -> str:
    """A heat map per benchmark: a row per corruption, a column per model and level."""
    maps = ""
    for part, summaries in content.parts.items():
        rows: dict[str, dict[str, dict[str, Mapping[str, Entry]]]] = {}
        for model, summary in summaries.items():
            for pool, kinds in corruptions(summary).items():
                for kind, levels in kinds.items():
                    rows.setdefault(pool, {}).setdefault(kind, {})[model] = levels
        blocks = [
            Block(
                [Row(escape(kind.replace("_", " ")), tree) for kind, tree in kinds.items()],
                escape(pool),
            )
            for pool, kinds in rows.items()
        ]
        if blocks:
            maps += heading(part) if len(content.parts) > 1 else ""
            maps += table(blocks, ("corruption",), _heat_form(summaries.values()), kind="heat")
    return maps


def _heat_form(summaries: Iterable[Summary]) -> Form:
    """A mean on a tint, from the least to the greatest; small ranges do not get all the tints."""
    means = [row["mean"] for found in summaries for row in found["detail"] if row["corruption"]]
    high = max(means)
    low = min(*means, high - _RANGE)
    return lambda entry: (shade(entry["mean"], low, high), number(entry["mean"]))


def _settings(content: Content) -> str:
    """What was asked of each model, and how intervals are made."""
    asked = "".join(
        folded(
            f"All settings: {model}",
            yaml.safe_dump(dict(of), allow_unicode=True, default_flow_style=None, width=120),
        )
        for model, of in content.settings.items()
    )
    return bullets(content.asked) + note(_INTERVALS) + asked
