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
from experiments.science import figures, texts
from experiments.science.plan import CHOSEN, METHODS, SEEDS, SEVERITIES, STUDIES, at
from experiments.science.results import Table
from roma.evaluate.figures import save
from roma.evaluate.wording import number, signed, signed_number
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
    yield save(
        figures.severity(_table("severity-test"), _table("perception")),
        ROOT / "docs/science_severity.png",
    )
    rows = list(texts.ABLATIONS.items())
    drawn = figures.ablations(_table("ablations-test"), rows, texts.ROMA)
    yield save(drawn, ROOT / "docs/science_ablations.png")


def _names() -> Mapping[str, Any]:
    """What a template may call."""
    return {
        "share": lambda name, arm, column, kind="accuracy": number(
            _table(name).entry(kind, arm, column)["mean"]
        ),
        "gain": lambda name, arm, against, column: signed(_difference(name, arm, against, column)),
        "gained": lambda name, arm, against, column: signed_number(
            _difference(name, arm, against, column)["mean"]
        ),
        "by": lambda name, arm, against, column: number(
            _difference(name, arm, against, column)["mean"]
        ),
        "lost": lambda name, arm, against, column: number(
            -_difference(name, arm, against, column)["mean"]
        ),
        "misread_more": lambda name: number(
            _table(name).entry("reading", "naive_5", "misread, clean")["mean"]
            - _table(name).entry("reading", "grpo", "misread, clean")["mean"]
        ),
        "poisoned": lambda name, arm, where: number(
            _table(name).entry("rollouts", arm, f"poisoned, {where}")["mean"]
        ),
        "minutes": _minutes,
        "covered": _covered,
        "cost": _cost,
        "ratio": _ratio,
        "rows": _rows,
        "gains": _gains,
        "steps_of": lambda name: lambda arm: _cost(name, arm, "steps"),
        "seconds_of": lambda name: lambda arm: _cost(name, arm),
        "dash": lambda _: "–",
        "severity_rows": _severity_rows,
        "ablation_rows": _ablation_rows,
        "poison_rows": _poison_rows,
        "reading_rows": _reading_rows,
        "hopes": _hopes,
        "seeds": len(SEEDS),
        "seeds_abl": len(STUDIES["ablations"].seeds),
        "chosen": f"{CHOSEN:g}",
    } | texts.NAMES


def _difference(name: str, arm: str, against: str, column: str) -> dict[str, float]:
    return _table(name).entry("difference", arm, column, against=against)


def _minutes(name: str) -> str:
    """What all stages of a report took."""
    return f"{sum(_table(name).column('time').values()) / 60:.1f}"


def _covered(kind: str) -> str:
    """The least and greatest coverage of a kind of interval, %."""
    found = _table("coverage").column(kind).values()
    return f"{number(min(found))} to {number(max(found))} %"


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


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _severity_rows(name: str, columns: Sequence[str]) -> str:
    """Every method at every severity, with its cost and training reward."""
    table, lines = _table(name), []
    arms = [("–", "grpo", "GRPO")]
    arms += [(f"{s:g}", at(m, s), arm_style(m).label) for s in SEVERITIES for m in METHODS]
    for severity, arm, label in arms:
        shares = [number(table.entry("accuracy", arm, column)["mean"]) for column in columns]
        reward = number(table.entry("training", arm, "reward, last fifth")["mean"])
        lines.append(_line(severity, label, _cost(name, arm), *shares, reward))
    return "\n".join(lines)


def _ablation_rows(name: str) -> str:
    """Every change of ROMA: its cost by ROMA's, and differences with intervals."""
    lines = []
    for arm, label in texts.ABLATIONS.items():
        found = [
            signed(_difference(name, arm, texts.ROMA, column)) for column in texts.ABLATED_COLUMNS
        ]
        lines.append(_line(label, _ratio(name, arm, texts.ROMA), *found))
    return "\n".join(lines)


def _poison_rows(name: str) -> str:
    """What rollouts are rewarded for: before training, and at its end."""
    table, lines = _table(name), []
    for arm, label, where in texts.ROLLOUTS:
        shares = [
            number(table.entry("rollouts", arm, f"{share}, {where}")["mean"])
            for share in ("rewarded", "misread", "poisoned")
        ]
        lines.append(_line(label, where, *shares[:2], f"**{shares[2]}**"))
    return "\n".join(lines)


def _reading_rows(name: str) -> str:
    """What greedy answers claim to see."""
    table, lines = _table(name), []
    wanted = ["misread, clean", "misread, seen L3", "misread, seen L5"]
    wanted += ["unfaithful, clean", "unfaithful, seen L5", "stock, seen L5"]
    for arm, label in texts.READERS.items():
        shares = [number(table.entry("reading", arm, column)["mean"]) for column in wanted]
        lines.append(_line(label, *shares))
    return "\n".join(lines)


def _hopes() -> str:
    """What was hoped for beside what was found."""
    lines = []
    for name, arm, against, label, column, least in texts.HOPES:
        found = _difference(name, arm, against, column)
        met = "met" if found["mean"] >= least else "**missed**"
        said = f"{label}, {column}: ≥ {signed_number(least)}"
        lines.append(_line(said, signed(found), met))
    return "\n".join(lines)
