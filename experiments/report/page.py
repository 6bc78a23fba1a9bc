"""report.html: one file without scripts or outside resources; every image is a data URI."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from experiments.report.costs import cpu_seconds_of, steps_of
from experiments.report.plots import METHODS, RIGHT, WRONG, GalleryItem, arm_order, arm_style

_WIDEST = 320  # px: larger gallery images are reduced, so that a report of photographs stays small

_STYLE = f"""
:root {{ color-scheme: light; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8; --tint: #f6f7f9; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main, header > div {{ max-width: 1190px; margin: 0 auto; padding: 0 28px; }}
header {{ background: var(--tint); border-bottom: 1px solid var(--line); padding: 34px 0 26px; }}
h1 {{ font-size: 29px; margin: 0 0 10px; letter-spacing: -.01em; }}
h2 {{ font-size: 21px; margin: 46px 0 6px; }}
p {{ margin: 6px 0 14px; max-width: 78ch; }}
.note {{ color: var(--soft); font-size: 14.5px; }}
nav a {{ color: #0a5a9c; margin-right: 18px; text-decoration: none; font-size: 14.5px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 13px; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; vertical-align: bottom; }}
thead {{ border-bottom: 2px solid var(--ink); }}
th.group, th.start, td.start {{ border-left: 1px solid var(--line); }}
th.group {{ text-align: center; }}
th.first, td:first-child {{ text-align: left; padding-left: 0; }}
td small {{ display: block; color: var(--soft); font-size: 12.5px; line-height: 1.25; }}
tr.mean td {{ font-weight: 650; }} tr.mean td small {{ font-weight: 400; }}
tr.pair td {{ font-weight: 650; padding-top: 20px; }}
td.up {{ background: #e3f1ea; }} td.down {{ background: #fbe6e0; }}
.arm::before {{ content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px;
               margin-right: 8px; background: var(--arm); }}
figure {{ margin: 10px 0 0; }} figure img {{ max-width: 100%; height: auto; }}
.cards {{ display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
ul {{ margin: 0 0 12px; padding-left: 20px; max-width: 110ch; }}
.card {{ border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }}
.card h3 {{ font-size: 15.5px; margin: 0 0 8px; }} .card table {{ font-size: 13px; width: 100%; }}
.card th, .card td {{ padding: 4px 8px 4px 0; text-align: left; white-space: normal;
                     vertical-align: top; }}
.card th {{ font-weight: 500; color: var(--soft); border-bottom: 0; }}
.card td:first-child {{ white-space: nowrap; }}
.card img {{ display: block; width: 100%; max-width: 190px; border-radius: 4px;
            image-rendering: pixelated; }}
.right {{ color: {RIGHT}; }} .wrong {{ color: {WRONG}; }}
pre {{ background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
      overflow-x: auto; font-size: 13px; line-height: 1.45; }}
summary {{ cursor: pointer; font-weight: 600; }}
.beside {{ display: flex; flex-wrap: wrap; gap: 60px; }}
footer {{ color: var(--soft); font-size: 13.5px; padding: 40px 0 60px; }}
@media print {{ nav {{ display: none; }} .card, figure {{ break-inside: avoid; }} }}
"""


_TITLE = "roma: which training survives bad images?"
_ACCURACY = (
    "Mean over seeds {seeds}; 95 % interval below. {images} test images per condition; seen and"
    " unseen are macro averages over their corruptions."
)
_DIFFERENCES = (
    "First arm minus second, on the same images. Coloured where the interval excludes 0: green if"
    " the first is better, red if the second is."
)
_ROBUSTNESS = (
    "Macro averages. Bars: 95 % interval over test images. Small dots: single seeds. Overlapping"
    " bars do not compare two arms, which share the images: see the paired differences."
)
_METHODS = (
    "Paired differences to GRPO, points. Lines: 95 % interval over test images; strokes: single"
    " seeds. Equal steps and rollouts, not equal time: see CPU s."
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

    def picture(name: str) -> str:
        return f'<figure><img src="{_data_uri(figures[name])}" alt="{name}"></figure>'

    seeds = ", ".join(map(str, report["seeds"]))
    body = [
        (
            "accuracy",
            "Accuracy, %",
            _note(_ACCURACY.format(seeds=seeds, images=report["images"])) + _accuracy_table(report),
        ),
        ("robustness", "Robustness over severity", _note(_ROBUSTNESS) + picture("robustness")),
        ("corruptions", "Each corruption", picture("corruptions")),
        ("training", "Learning curves", _note(_TRAINING) + picture("learning_curves")),
    ]
    if any(arm in METHODS for arm in report["arms"]):
        body.insert(2, ("methods", "Every arm beside GRPO", _note(_METHODS) + picture("methods")))
    if report["differences"]:
        table = _note(_DIFFERENCES) + _difference_table(report)
        body.insert(1, ("differences", "Paired differences, percentage points", table))
    if gallery:
        body.append(("gallery", "Test images and answers", _note(_GALLERY) + _cards(gallery)))
    body.append(
        ("setup", "Set-up", _note(f"Settings tuned on: {report['tuned_on']}.") + _setup(report))
    )
    links = "".join(f'<a href="#{name}">{name}</a>' for name, _, _ in body)
    sections = "".join(
        f'<section id="{name}"><h2>{title}</h2><div class="wide">{content}</div></section>\n'
        for name, title, content in body
    )
    opening, *findings, caveat = (escape(sentence) for sentence in summary)
    listed = "".join(f"<li>{finding}</li>" for finding in findings)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><header><div><h1>{_TITLE}</h1><p>{opening}</p>"
        f'<ul>{listed}</ul><p class="note">{caveat}</p><nav>{links}</nav></div></header>\n'
        f"<main>{sections}<footer>The same numbers stand in report.json.</footer></main>"
        "</body></html>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _arm(name: str) -> str:
    style = arm_style(name)
    return f'<span class="arm" style="--arm:{style.colour}">{escape(style.label)}</span>'


def _head(tree: Mapping[str, Any], *first: str) -> str:
    """Two header rows: pools over their levels; a pool without levels spans both rows."""
    top = "".join(f'<th class="first" rowspan="2">{name}</th>' for name in first)
    below = ""
    for pool, found in tree.items():
        if "mean" in found:
            top += f'<th rowspan="2">{pool}</th>'
        else:
            top += f'<th class="group" colspan="{len(found)}">{pool}</th>'
            below += "".join(
                f'<th class="{"" if i else "start"}">{level}</th>' for i, level in enumerate(found)
            )
    return f"<thead><tr>{top}</tr><tr>{below}</tr></thead>"


def _entries(tree: Mapping[str, Any]) -> Iterable[tuple[Mapping[str, float], str]]:
    """Entries in column order, each with its CSS class: "start" where a pool starts."""
    for found in tree.values():
        if "mean" in found:
            yield found, ""
        else:
            yield from ((entry, "" if i else "start") for i, entry in enumerate(found.values()))


def _accuracy_table(report: Mapping[str, Any]) -> str:
    rows, timed = "", report["costs"]
    for arm, tree in report["arms"].items():
        cells = "".join(
            f'<td class="{start}">{e["mean"]:.1f}<small>{e["low"]:.1f}–{e["high"]:.1f}</small></td>'
            for e, start in _entries(tree)
        )
        own = [steps_of(timed.get(arm)), cpu_seconds_of(timed.get(arm))] if timed else []
        costs = "".join(f"<td>{value}</td>" for value in own)
        rows += f"<tr><td>{_arm(arm)}</td>{costs}{cells}</tr>"
    first = ("arm", "steps", "CPU s a run") if timed else ("arm",)
    head = _head(next(iter(report["arms"].values())), *first)
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def _difference_table(report: Mapping[str, Any]) -> str:
    tree = next(iter(report["arms"].values()))
    width = 1 + sum(1 for _ in _entries(tree))
    rows = ""
    for name, by_seed in report["differences"].items():
        label = " − ".join(_arm(arm) for arm in name.split("-"))
        rows += f'<tr class="pair"><td colspan="{width}">{label}</td></tr>'
        for seed, found in by_seed.items():
            cells = "".join(
                f'<td class="{start} {_direction(e)}">{_signed(e["mean"])}'
                f"<small>{_signed(e['low'])} … {_signed(e['high'])}</small></td>"
                for e, start in _entries(found)
            )
            rows += f'<tr class="{seed}"><td>{seed}</td>{cells}</tr>'
    return f"<table>{_head(tree, 'seed')}<tbody>{rows}</tbody></table>"


def _direction(entry: Mapping[str, float]) -> str:
    """CSS class of a difference: "up" or "down" where the interval excludes 0."""
    return "up" if entry["low"] > 0 else "down" if entry["high"] < 0 else ""


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _cards(items: Sequence[GalleryItem]) -> str:
    return f'<div class="cards">{"".join(map(_card, items))}</div>'


def _card(item: GalleryItem) -> str:
    """One test image: clean and degraded, and a row of two answers for each arm."""
    shown = {"clean": ("clean", item.clean), "degraded": (item.condition, item.degraded)}
    names = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name, _ in shown.values())
    images = "".join(
        f'<td><img src="{_data_uri(_png(image))}" alt="{escape(name)}"></td>'
        for name, image in shown.values()
    )
    rows = ""
    for arm in arm_order(item.answers):
        said = "".join(_said(item.answers[arm].get(where)) for where in shown)
        rows += f"<tr><td>{_arm(arm)}</td>{said}</tr>"
    truth = f'<span class="note">truth: {escape(item.truth)}</span>'
    return (
        f'<div class="card"><h3>{escape(item.question)} {truth}</h3><table>'
        f"<tr><th></th>{names}</tr><tr><td></td>{images}</tr>{rows}</table></div>"
    )


def _said(answer: tuple[str, bool] | None) -> str:
    """A cell with an answer, ✓ or ✗."""
    if answer is None:
        return "<td></td>"
    kind, sign = ("right", "✓") if answer[1] else ("wrong", "✗")
    return f'<td class="{kind}">{sign} {escape(answer[0])}</td>'


def _png(image: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((_WIDEST, _WIDEST))  # never enlarges
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _setup(report: Mapping[str, Any]) -> str:
    timings = _name_table("stage", "seconds", _flat(report["timings"]))
    versions = _name_table("package", "version", _flat(report["versions"]))
    config = escape(yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True))
    return (
        f'<div class="beside"><div>{timings}</div><div>{versions}</div></div>'
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by " / "."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name} / ") if isinstance(value, Mapping) else {name: value})
    return flat


def _name_table(name: str, unit: str, values: Mapping[str, Any]) -> str:
    rows = ""
    for key, value in values.items():
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        rows += f"<tr><td>{escape(key)}</td><td>{escape(shown)}</td></tr>"
    head = f'<thead><tr><th class="first">{name}</th><th>{unit}</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"
