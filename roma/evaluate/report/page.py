"""A report's page: one file without scripts or outside resources; every image is a data URI.

What is passed as text is escaped here; what is passed as HTML (a section's content) was made by the
functions of this folder, which escape what they are given.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from roma.evaluate.figures import RIGHT, WRONG

_SHADES = 9  # of a heat map, from white to the darkest on which black text still reads well
_DARKEST = (240, 160, 120)


def _shades() -> str:
    """CSS classes .h0 (white) to .h8: tints of one orange, so that light and dark tell them."""
    rules = []
    for turn in range(_SHADES):
        part = turn / (_SHADES - 1)
        red, green, blue = (round(255 + part * (end - 255)) for end in _DARKEST)
        rules.append(f"td.h{turn} {{ background: rgb({red},{green},{blue}); }}")
    return "\n".join(rules)


_STYLE = f"""
:root {{ color-scheme: light; --ink: #1d2329; --soft: #5b6570; --line: #dfe3e8; --tint: #f6f7f9; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main, header > div {{ max-width: 1190px; margin: 0 auto; padding: 0 28px; }}
header {{ background: var(--tint); border-bottom: 1px solid var(--line); padding: 34px 0 26px; }}
h1 {{ font-size: 29px; margin: 0 0 10px; letter-spacing: -.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 21px; margin: 46px 0 6px; }}
h3 {{ font-size: 17px; margin: 30px 0 6px; overflow-wrap: anywhere; }}
p {{ margin: 6px 0 14px; max-width: 78ch; overflow-wrap: anywhere; }}
.note {{ color: var(--soft); font-size: 14.5px; }}
nav a {{ color: #0a5a9c; margin-right: 18px; text-decoration: none; font-size: 14.5px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 7px 13px; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; vertical-align: bottom; }}
thead {{ border-bottom: 2px solid var(--ink); }}
th.group, th.start, td.start {{ border-left: 1px solid var(--line); }}
th.group {{ text-align: center; white-space: normal; overflow-wrap: anywhere; min-width: 9ch; }}
th.first, td:first-child {{ text-align: left; padding-left: 0; }}
td.name {{ white-space: normal; overflow-wrap: anywhere; min-width: 18ch; max-width: 44ch; }}
td small {{ display: block; color: var(--soft); font-size: 12.5px; line-height: 1.25; }}
tr.mean td {{ font-weight: 700; }} tr.mean td small {{ font-weight: 400; }}
tr.pair td {{ font-weight: 700; padding-top: 20px; white-space: normal; overflow-wrap: anywhere; }}
td.up {{ background: #dcedf8; }} td.down {{ background: #fbe6e0; }}
.heat td {{ padding: 4px 9px; }} .heat td:first-child {{ padding-left: 0; }}
.arm::before {{ content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px;
               margin-right: 8px; background: var(--arm); }}
figure {{ margin: 10px 0 0; }} figure img {{ max-width: 100%; height: auto; }}
.cards {{ display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
ul {{ margin: 0 0 12px; padding-left: 20px; max-width: 110ch; overflow-wrap: anywhere; }}
.card {{ border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }}
.card h3 {{ font-size: 15.5px; margin: 0 0 8px; }} .card table {{ font-size: 13px; width: 100%; }}
.card th, .card td {{ padding: 4px 8px 4px 0; text-align: left; white-space: normal;
                     vertical-align: top; overflow-wrap: anywhere; }}
.card td:first-child {{ white-space: nowrap; }}
.card th {{ font-weight: 500; color: var(--soft); border-bottom: 0; }}
.card img {{ display: block; width: 100%; max-width: 190px; border-radius: 4px;
            image-rendering: pixelated; }}
.right {{ color: {RIGHT}; }} .wrong {{ color: {WRONG}; }}
pre {{ background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
      overflow-x: auto; font-size: 13px; line-height: 1.45; }}
summary {{ cursor: pointer; font-weight: 600; }}
.beside {{ display: flex; flex-wrap: wrap; gap: 60px; }}
footer {{ color: var(--soft); font-size: 13.5px; padding: 40px 0 60px; }}
@media print {{
  @page {{ size: A4 landscape; margin: 12mm; }}
  body {{ font-size: 12px; }} table {{ font-size: 11px; }} th, td {{ padding: 4px 7px; }}
  .note, td small {{ font-size: 10.5px; }} .note {{ break-after: avoid; }}
  .cards {{ grid-template-columns: 1fr 1fr; }} .wide {{ overflow: visible; }}
  nav {{ display: none; }}
  .card, figure, tr {{ break-inside: avoid; }}
  h2, h3, thead, tr.pair {{ break-after: avoid; }} td {{ print-color-adjust: exact; }}
}}
{_shades()}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor (lower-case letters), its heading, and its content as HTML."""

    name: str
    title: str
    html: str


def render(
    title: str,
    *,
    opening: str,
    findings: Sequence[str],
    notes: Sequence[str] = (),
    caveat: str,
    sections: Sequence[Section],
    footer: str,
) -> str:
    """The whole page as HTML.

    Args:
        title: of the page; text, as are the next four.
        opening: what was measured.
        findings: a sentence each.
        notes: what a reader of the findings should know of the run, a sentence each.
        caveat: what the intervals do and do not cover.
        sections: in order.
        footer: text.
    """
    links = "".join(f'<a href="#{part.name}">{part.name}</a>' for part in sections)
    parts = "".join(
        f'<section id="{part.name}"><h2>{escape(part.title)}</h2>'
        f'<div class="wide">{part.html}</div></section>\n'
        for part in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><header><div><h1>{escape(title)}</h1>"
        f"<p>{escape(opening)}</p>{bullets(findings)}{note(caveat)}{bullets(notes, kind='note')}"
        f"<nav>{links}</nav></div></header>\n"
        f"<main>{parts}<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def shade(value: float, low: float, high: float) -> str:
    """CSS class of a heat map's cell: white at `high`, the darkest shade at `low`.

    Example:
        >>> shade(90.0, 40.0, 90.0), shade(40.0, 40.0, 90.0), shade(50.0, 50.0, 50.0)
        ('h0', 'h8', 'h0')
    """
    part = (high - value) / (high - low) if high > low else 0.0
    return f"h{round(part * (_SHADES - 1))}"


def note(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def bullets(sentences: Sequence[str], *, kind: str = "") -> str:
    """A list of sentences; nothing where there are none."""
    items = "".join(f"<li>{escape(said)}</li>" for said in sentences)
    given = f' class="{kind}"' if kind else ""
    return f"<ul{given}>{items}</ul>" if items else ""


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def data_uri(png: bytes) -> str:
    """A PNG file as an image's address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture(png: bytes, alt: str) -> str:
    """A figure."""
    return f'<figure><img src="{data_uri(png)}" alt="{escape(alt)}"></figure>'


def named(label: str, colour: str) -> str:
    """A name behind a square of its colour."""
    return f'<span class="arm" style="--arm:{escape(colour)}">{escape(label)}</span>'


def name_table(name: str, unit: str, values: Mapping[str, Any]) -> str:
    """A table of two columns: keys of nested mappings joined by " / ", and their values."""
    rows = ""
    for key, value in _flat(values).items():
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        rows += f'<tr><td class="name">{escape(key)}</td><td class="name">{escape(shown)}</td></tr>'
    head = f'<thead><tr><th class="first">{escape(name)}</th><th>{escape(unit)}</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"


def folded(title: str, text: str) -> str:
    """Preformatted text, shown on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name} / ") if isinstance(value, Mapping) else {name: value})
    return flat
