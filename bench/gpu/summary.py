"""A card's benchmark as two tables of docs/BENCHMARKS.md, between its markers "card".

    python -m bench.gpu.summary bench/results/h200.csv

The loss: every composition of the whole loss, in the order of the first size. The head: log-probs
alone. A cell is a time and, in brackets, its ratio to ours, as in the table of a CPU.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.ops import ACTIVE
from bench.providers import OURS
from bench.results import Row, read
from roma_kernels.errors import fail

PAGE = Path(__file__).parents[2] / "docs/BENCHMARKS.md"
BEGIN, END = "<!-- card:begin, written by python -m bench.gpu.summary -->", "<!-- card:end -->"
Column = tuple[str, Callable[[Row], bool]]


def tables(rows: list[Row], path: Path) -> str:
    """Both tables, the line that says what was run, and the peers that were not timed.

    Args:
        rows: of a card's CSV.
        path: of that CSV, for the link.

    Raises:
        ValueError: the rows hold no time of a whole loss, or none of the head.
    """
    timed = [row for row in rows if row.get("ms_p50")]
    loss, head = ([r for r in timed if r["op"] == op] for op in ("roma_loss", "linear_logprob"))
    if not loss or not head:
        got = ", ".join(sorted({row["op"] for row in timed})) or "no times"
        fail("rows", "times of roma_loss and linear_logprob", got, "give a CSV of preset card")
    first, rounds = timed[0], [int(row["rounds"]) for row in timed]
    not_timed = {r["provider"]: r["reason"].split(". ")[0] for r in rows if r.get("reason")}
    names = "; ".join(f"{n} ({why})" for n, why in not_timed.items() if not n.endswith(ACTIVE))
    return "\n".join(
        [
            *_table(loss, _columns(loss), last=("extra MiB", "logp rms", "worst view agrees")),
            "",
            *_table(head, _columns(head), last=("extra MiB", "logp rms")),
            "",
            f"{first['machine']}, driver {first['driver']}; torch {first['torch']}, Triton "
            f"{first['triton']}; commits {', '.join(sorted({r['commit'] for r in timed}))}; "
            f"D = {first['depth']}, V = {first['vocab']}, {first['dtype']}. Medians of "
            f"{min(rounds)} to {max(rounds)} rounds; in brackets: the ratio to ours, paired within "
            "rounds, “level” where its 95 % interval contains 1. Memory and errors are those of a "
            f"table's first column. Source: [{path.name}](../bench/results/{path.name}).",
            "",
            f"Not timed: {names}.",
        ]
    )


def _columns(rows: list[Row]) -> list[Column]:
    """A column a variant, in the order of the file: the base first."""
    keys = ("phase", "tokens", "views", "active", "worst_over")
    found = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    return [(_name(*one), _is(keys, one)) for one in found]


def _is(keys: tuple[str, ...], one: tuple[str, ...]) -> Callable[[Row], bool]:
    return lambda row: all(row[key] == value for key, value in zip(keys, one, strict=True))


def _name(phase: str, tokens: str, views: str, active: str, worst_over: str) -> str:
    if views != "0":
        return f"N = {tokens}, K = {views}" + (", worst by token" if worst_over == "token" else "")
    share = "" if active == "1" else f", {float(active):.0%} active"
    return f"{'forward' if phase == 'forward' else '+ backward'}, {tokens}{share}"


def _table(rows: list[Row], columns: list[Column], last: tuple[str, ...]) -> Iterator[str]:
    op = "whole loss" if rows[0]["op"] == "roma_loss" else "log-probs"
    yield f"| {op}, ms | " + " | ".join([*(name for name, _ in columns), *last]) + " |"
    yield "|---" * (1 + len(columns) + len(last)) + "|"
    for name in dict.fromkeys(row["provider"] for row in rows):
        one = next(row for row in rows if row["provider"] == name)
        cells = [_cell(rows, name, wanted) for _, wanted in columns]
        cells += [f"{float(one['extra_mib']):.0f}", one["logp_rms"]]
        if "worst view agrees" in last:
            cells.append(f"{float(one['worst_view']):.0%}")
        yield f"| {f'**{name}**' if name == OURS else name} | " + " | ".join(cells) + " |"


def _cell(rows: list[Row], name: str, wanted: Callable[[Row], bool]) -> str:
    """A candidate's time in one variant, and beside it the ratio to ours."""
    row = next((r for r in rows if r["provider"] == name and wanted(r)), None)
    if row is None:
        return "–"
    ms = float(row["ms_p50"])
    text = f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"
    if name == OURS or not row["ratio"]:
        return text
    if float(row["ratio_low"]) <= 1 <= float(row["ratio_high"]):
        return f"{text} (level)"
    return f"{text} ({float(row['ratio']):.2g}×)"


def put(text: str, made: str) -> str:
    """The page with the tables between its markers.

    Raises:
        ValueError: the page has lost them.
    """
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(between.findall(text)) != 1:
        found = str(len(between.findall(text)))
        fail(PAGE.name, f"one {BEGIN} … {END}", found, "put the markers back")
    return between.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    path = parser.parse_args().csv
    PAGE.write_text(put(PAGE.read_text(), tables(read(path), path)))
    print(f"written: the tables of a card in {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
