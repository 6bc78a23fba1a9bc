"""The documents whose numbers come from the CSV files: docs/SCIENCE.md, docs/DEMO.md, README's.

A template (templates/*.j2) is the text with calls in place of numbers, of functions named in
`_names`; nothing else in them is a measured number. README holds one block between two markers.
A test renders all of them again and compares.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from experiments.report.plots import arm_style
from experiments.science import figures
from experiments.science.plan import SEEDS, SEVERITIES, at
from experiments.science.results import Table
from roma.evaluate.figures import save
from roma.evaluate.wording import number, signed, signed_number, with_interval
from roma_kernels.errors import fail

ROOT = Path(__file__).resolve().parents[2]
_TEMPLATES = Path(__file__).parent / "templates"
PAGES = {"SCIENCE.md.j2": ROOT / "docs/SCIENCE.md", "DEMO.md.j2": ROOT / "docs/DEMO.md"}
"""Template → the document that it makes."""
README, BLOCK = ROOT / "README.md", "README.md.j2"
_MARKED = re.compile(
    r"(?P<open><!-- figures: make science -->\n).*?(?P<close><!-- end of figures -->)", re.DOTALL
)
_table = cache(Table)


def forget() -> None:
    """Reads the CSV files anew from now on."""
    _table.cache_clear()


def render(template: str) -> str:
    """A template as the text of its document.

    Raises:
        ValueError: a number that no CSV file has.
    """
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(_names())


def readme(text: str) -> str:
    """README.md's text with its block made anew.

    Raises:
        ValueError: it has no such block.
    """
    found = _MARKED.search(text)
    if found is None:
        fail("README.md", "a block of figures between its markers", "none", "put the markers back")
    block = found["open"] + render(BLOCK) + found["close"]
    return text[: found.start()] + block + text[found.end() :]


def write_pages() -> Iterator[Path]:
    """Writes every document, and yields its path."""
    for template, path in PAGES.items():
        path.write_text(render(template), encoding="utf-8")
        yield path
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    yield README


def write_figures() -> Iterator[Path]:
    """Draws the figures of docs/SCIENCE.md, and yields their paths."""
    yield save(figures.severity(_table("severity-test")), ROOT / "docs/science_severity.png")
    rows = [(arm, label) for arm, label in ABLATIONS.items() if arm != _ROMA]
    drawn = figures.ablations(_table("ablations-test"), rows, _ROMA)
    yield save(drawn, ROOT / "docs/science_ablations.png")


_ROMA = at("roma", 3.5)
ABLATIONS = {
    _ROMA: "ROMA",
    "roma_no_penalty": "no penalty (λ_inv 0)",
    "roma_no_aux": "no auxiliary loss (λ_aux 0)",
    "roma_no_mask": "penalty on wrong answers too",
    "roma_mean_view": "mean of the views, not the worst",
    "roma_token_worst": "worst view of each token",
    "roma_batch_worst": "worst view of the batch",
    "roma_k1": "K = 1",
    "roma_k4": "K = 4",
    "roma_inv0.3": "λ_inv 0.3",
    "roma_inv3": "λ_inv 3",
    "roma_aux0.5": "λ_aux 0.5",
    "roma_reverse": "penalty in the other direction",
    "roma_over_correct": "penalty over right answers' number",
    "roma_gate_tau": "gate, τ = 0.3",
    "roma_gate_quantile": "gate, quantile 0.9",
}
"""Arms of the ablations → what they change, in the order of their table."""


def _names() -> Mapping[str, Any]:
    """What a template may call."""
    return {
        "share": lambda name, arm, column, kind="accuracy": number(
            _table(name).entry(kind, arm, column)["mean"]
        ),
        "share_in": lambda name, arm, column, kind="accuracy": with_interval(
            _table(name).entry(kind, arm, column)
        ),
        "gain": lambda name, arm, against, column: signed(
            _table(name).entry("difference", arm, column, against=against)
        ),
        "gained": lambda name, arm, against, column: signed_number(
            _table(name).entry("difference", arm, column, against=against)["mean"]
        ),
        "span": _span,
        "cost": _cost,
        "ratio": _ratio,
        "rows": _rows,
        "gains": _gains,
        "seeds": len(SEEDS),
        "severities": [f"{severity:g}" for severity in SEVERITIES],
        "ablations": ABLATIONS,
        "label": lambda arm: arm_style(arm).label,
    }


def _span(name: str, arm: str, column: str, kind: str) -> str:
    """The least and greatest over seeds."""
    found = _table(name).entry(kind, arm, column)
    low, high = number(found["low"]), number(found["high"])
    return low if low == high else f"{low}–{high}"


def _cost(name: str, arm: str, column: str = "cpu_s") -> str:
    """CPU seconds of a run, mean over seeds, or its steps."""
    found = _table(name).entry("cost", arm, column)
    if column == "cpu_s" or found["low"] == found["high"]:
        return f"{found['mean']:.0f}"
    return f"{found['low']:.0f}–{found['high']:.0f}"


def _ratio(name: str, arm: str, against: str) -> str:
    """CPU time of an arm by another's."""
    table = _table(name)
    one, other = (table.entry("cost", each, "cpu_s")["mean"] for each in (arm, against))
    return f"{one / other:.2f}"


def _rows(
    name: str,
    arms: Mapping[str, str],
    columns: Sequence[str],
    *,
    kind: str = "accuracy",
    first: Sequence[Callable[[str], str]] = (),
) -> str:
    """Rows of a Markdown table: an arm's label, then a number a column."""
    table, lines = _table(name), []
    for arm, label in arms.items():
        cells = [number(table.entry(kind, arm, column)["mean"]) for column in columns]
        lines.append(f"| {' | '.join([label, *(of(arm) for of in first), *cells])} |")
    return "\n".join(lines)


def _gains(name: str, pairs: Sequence[tuple[str, str, str]], columns: Sequence[str]) -> str:
    """Rows of a Markdown table: a pair's label, then a difference with its interval a column."""
    table, lines = _table(name), []
    for arm, against, label in pairs:
        found = [table.entry("difference", arm, column, against=against) for column in columns]
        lines.append(f"| {' | '.join([label, *map(signed, found)])} |")
    return "\n".join(lines)
