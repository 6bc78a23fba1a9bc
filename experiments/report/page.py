"""report.html of a comparison between trained models, of the parts of `roma.evaluate.report`."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from experiments.report.columns import range_of_training
from experiments.report.costs import cpu_seconds_of, steps_of
from experiments.report.plots import METHODS, arm_style
from roma.evaluate.report.cards import GalleryItem, cards
from roma.evaluate.report.page import Section, folded, name_table, named, note, picture, render
from roma.evaluate.report.tables import Block, Row, difference_form, share_form, table

_TITLE = "roma: which training survives bad images?"
_ACCURACY = (
    "Mean over seeds {seeds}; 95 % interval below. {images} test images per condition; seen and"
    " unseen are macro averages over their corruptions."
)
_DIFFERENCES = (
    "First arm minus second, on the same images. Coloured where the interval excludes 0: blue if"
    " the first is better, red if the second is. Intervals cover {covers}."
)
_ROBUSTNESS = (
    "Macro averages. Bars: 95 % intervals; they cover {covers}. Small dots: single seeds."
    " Overlapping bars do not compare two arms, which share the images: see the paired differences."
)
_METHODS = (
    "Paired differences to GRPO, points. Lines: 95 % intervals; they cover {covers}. Strokes:"
    " single seeds. Equal steps and rollouts, not equal time: see CPU s."
)
_TRAINING = "Mean over seeds, smoothed over 1/30 of the steps. Bands: range over seeds."
_GALLERY = (
    "Taken at equal distances through the test set, independent of the answers; each arm's first"
    " seed. ✓ right, ✗ wrong."
)


def render_page(
    report: Mapping[str, Any],
    summary: Sequence[str],
    figures: Mapping[str, bytes],
    gallery: Sequence[GalleryItem],
) -> str:
    """The whole page as HTML.

    Args:
        report: of `experiments.report.report.build_report`.
        summary: of `experiments.report.report.summary`: opening, findings, caveat.
        figures: name → PNG file; "robustness", "corruptions" and "learning_curves" are shown.
        gallery: test images with answers; none: no such section.
    """
    seeds = ", ".join(map(str, report["seeds"]))
    said = _ACCURACY.format(seeds=seeds, images=report["images"])
    covers, reach = report["intervals"]["covers"], range_of_training(report)
    body = [Section("accuracy", "Accuracy, %", note(said) + _accuracy_table(report))]
    if report["differences"]:
        content = note(_DIFFERENCES.format(covers=covers)) + _difference_table(report)
        body.append(Section("differences", "Paired differences, percentage points", content))
    said = " ".join(filter(None, (_ROBUSTNESS.format(covers=covers), reach)))
    content = note(said) + picture(figures["robustness"], "robustness")
    body.append(Section("robustness", "Robustness over severity", content))
    if any(arm in METHODS for arm in report["arms"]):
        content = note(_METHODS.format(covers=covers)) + picture(figures["methods"], "methods")
        body.append(Section("methods", "Every arm beside GRPO", content))
    content = picture(figures["corruptions"], "corruptions")
    body.append(Section("corruptions", "Each corruption", content))
    content = note(_TRAINING) + picture(figures["learning_curves"], "learning curves")
    body.append(Section("training", "Learning curves", content))
    if gallery:
        content = note(_GALLERY) + cards(gallery, arm_style)
        body.append(Section("gallery", "Test images and answers", content))
    content = note(f"Settings tuned on: {report['tuned_on']}.") + _setup(report)
    body.append(Section("setup", "Set-up", content))
    opening, *findings, caveat = summary
    return render(
        _TITLE,
        opening=opening,
        findings=findings,
        caveat=caveat,
        sections=body,
        footer="The same numbers stand in report.json and report.csv.",
    )


def _arm(name: str) -> str:
    return named(arm_style(name).label, arm_style(name).colour)


def _accuracy_table(report: Mapping[str, Any]) -> str:
    timed = report["costs"]
    rows = []
    for arm, tree in report["arms"].items():
        own = [steps_of(timed.get(arm)), cpu_seconds_of(timed.get(arm))] if timed else []
        rows.append(Row(_arm(arm), tree, own))
    first = ("arm", "steps", "CPU s a run") if timed else ("arm",)
    return table([Block(rows)], first, share_form)


def _difference_table(report: Mapping[str, Any]) -> str:
    blocks = []
    for name, by_seed in report["differences"].items():
        rows = [Row(seed, tree, kind=seed) for seed, tree in by_seed.items()]
        blocks.append(Block(rows, " − ".join(_arm(arm) for arm in name.split("-"))))
    return table(blocks, ("seed",), difference_form)


def _setup(report: Mapping[str, Any]) -> str:
    timings = name_table("stage", "seconds", report["timings"])
    versions = name_table("package", "version", report["versions"])
    config = yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True)
    return f'<div class="beside"><div>{timings}</div><div>{versions}</div></div>' + folded(
        "Configuration", config
    )
