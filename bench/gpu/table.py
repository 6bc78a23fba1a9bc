"""What a run has found, as one page of Markdown (gpu.md) and as a tidy CSV (gpu.csv).

Both are written anew from the journal and the benchmark's CSV after every part, whatever is there.
The CSV has one number a line: section, subject, quantity, value.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import bars, winners
from bench.gpu.bars import number, timed
from bench.gpu.journal import Journal

PAGE, NUMBERS, BENCH, TUNING = "gpu.md", "gpu.csv", "bench.csv", "tuning.json"
_OWN = ("kind", "step", "part", "item")
_MOST = 60  # findings of one kind that the page shows; the CSV has all
Cells = Sequence[object]


def write(out: Path, journal: Journal) -> None:
    """Writes the page, the CSV, and the tuning table that the sweep makes of its findings."""
    rows = _bench_rows(out / BENCH)
    tuning, changes = winners.table(journal)
    _put(out / PAGE, "\n".join(page(journal, rows, changes)) + "\n")
    if tuning:
        _put(out / TUNING, tuning)
    new = out / f"{NUMBERS}.new"
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("section", "subject", "quantity", "value"))
        writer.writerows(numbers(journal, rows))
    new.replace(out / NUMBERS)


def page(journal: Journal, rows: list[bars.Row], changes: list[str]) -> Iterator[str]:
    """The lines of the page."""
    yield "# What this machine shows"
    yield ""
    yield from _head(journal)
    yield from _section("Bars", ("bar", "measured", "verdict"), _bars(journal, rows))
    yield from _section("Steps", ("step", "part", "status", "s", "reason"), _steps(journal))
    yield from _correct(journal)
    yield from _tests(journal)
    yield from _bench(rows, journal)
    yield from _sweep(journal, changes)
    yield from _profile(journal)


def numbers(journal: Journal, rows: list[bars.Row]) -> Iterator[Cells]:
    """The lines of the CSV."""
    for bar in _bars(journal, rows):
        yield ("bar", bar[0], "measured", bar[1])
        yield ("bar", bar[0], "verdict", bar[2])
    for line in _ends(journal):
        for name in ("status", "seconds", "reason"):
            yield ("step", f"{line.get('step')}, {line.get('part')}", name, line.get(name, ""))
    for step in dict.fromkeys(line.get("step") for line in journal.lines if line["kind"] == "row"):
        for item, row in journal.rows(str(step)).items():
            for name, value in row.items():
                if name not in _OWN:
                    yield (step, item, name, value)
    for row in rows:
        subject = ", ".join(
            str(row.get(n, "")) for n in ("op", "phase", "dtype", "active", "worst_over")
        )
        subject = f"{subject}, {bars.size(row)}, {row.get('provider', '')}"
        for name, value in row.items():
            if value:
                yield ("benchmark", subject, name, value)


def _bench_rows(path: Path) -> list[bars.Row]:
    """The benchmark's rows; none if there is no such file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = (line.replace("\0", "") for line in file)
        rows = [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(lines)]
    return [row for row in rows if row.get("provider")]


def _put(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _ends(journal: Journal) -> list[dict[str, Any]]:
    """How each part ended last."""
    found = {
        (str(line.get("step")), str(line.get("part"))): line
        for line in journal.lines
        if line["kind"] == "end"
    }
    return list(found.values())


def _head(journal: Journal) -> Iterator[str]:
    """The machine, its versions, the rates, the commit."""
    facts = journal.rows("facts")
    machine, versions = facts.get("machine", {}), facts.get("versions", {})
    words = [str(machine.get("name", "an unknown machine"))]
    for name, unit in (("multiprocessors", "multiprocessors"), ("l2_mib", "MiB of L2"),
                       ("memory_gib", "GiB")):  # fmt: skip
        if name in machine:
            words.append(f"{_figure(machine[name])} {unit}")
    words += [f"{name} {_figure(machine[name])}" for name in ("driver", "power_limit_w",
              "clock_sm_max_mhz", "clock_memory_mhz", "mig", "ecc") if name in machine]  # fmt: skip
    yield ", ".join(words) + "."
    known = [f"{n} {v}" for n, v in versions.items() if n not in (*_OWN, "status") and v != "-"]
    if known:
        yield ""
        yield ", ".join(known) + "."
    rates = []
    if "product" in facts:
        row = facts["product"]
        rates.append(f"the vendor's bf16 product {_figure(row.get('tflops'))} TFLOP/s "
                     f"({_figure(row.get('size'))}³, best {_figure(row.get('tflops_best'))}"
                     + (f", with fp32 results {_figure(row['tflops_fp32_out'])})"
                        if "tflops_fp32_out" in row else ")"))  # fmt: skip
    if "copy" in facts:
        rates.append(f"a copy {_figure(facts['copy'].get('gb_s'))} GB/s")
    if "load" in facts:
        row = facts["load"]
        rates.append(f"product after product {_figure(row.get('tflops'))} TFLOP/s at "
                     f"{_figure(row.get('clock_sm_mhz'))} MHz, {_figure(row.get('power_w'))} W, "
                     f"{_figure(row.get('temperature_c'))} °C, throttled {row.get('throttled', '?')}")  # fmt: skip  # noqa: E501
    if rates:
        yield ""
        yield "Measured: " + "; ".join(rates) + "."
    calls = [line for line in journal.lines if line["kind"] == "call"]
    if calls:
        yield ""
        yield "Calls: " + "; ".join(
            f"{line.get('time', '?')}, commit {line.get('commit', '?')}, {line.get('device', '?')}"
            for line in calls
        ) + "."  # fmt: skip


def _bars(journal: Journal, rows: list[bars.Row]) -> list[bars.Bar]:
    square = number(journal.rows("facts").get("product", {}).get("tflops"))
    calls = [line for line in journal.lines if line["kind"] == "call"]
    on_card = any(line.get("device") == "cuda" for line in calls)
    if not on_card:  # what a CPU shows says nothing about a bar
        rows = []
    tests = journal.rows("tests") if on_card else {}
    whole = (journal.end("tests", "pytest") or {}).get("status") in ("ok", "failed")
    return bars.bars(tests, rows, square if square > 0 and on_card else None, whole)


def _steps(journal: Journal) -> Iterator[Cells]:
    for line in _ends(journal):
        names = ("step", "part", "status", "seconds", "reason")
        yield tuple(line.get(name, "") for name in names)


def _correct(journal: Journal) -> Iterator[str]:
    names = ("logp_rms", "logp_max", "gap_rms", "entropy_max", "dhidden", "dweight", "loss")
    cells = []
    for step in ("correct", "fallback", "sanitizer"):
        for item, row in journal.rows(step).items():
            shares = [number(row.get(n)) / number(row.get(f"{n}_bound")) for n in names]
            worst = max((s for s in shares if s == s), default=None)
            errors = [f"{number(row[n]):.1e}" if n in row else "" for n in names]
            share = "" if worst is None else f"{worst:.2f}"
            cells.append((f"{step}: {item}", row.get("shape", ""), *errors, share,
                          row.get("status", "?"), row.get("reason", "")))  # fmt: skip
    yield from _section(
        "Correct: errors against float64",
        ("case", "shape", "logp rms", "logp max", "view − clean rms", "entropy max", "dh", "dW",
         "loss", "share of the bound", "verdict", "reason"),
        cells,
    )  # fmt: skip


def _tests(journal: Journal) -> Iterator[str]:
    tests = journal.rows("tests")
    if not tests:
        return
    good = sum(row.get("status") == "ok" for row in tests.values())
    yield ""
    yield f"## Tests: {good} of {len(tests)} passed"
    wrong = [(item, row.get("status", "?"), row.get("reason", ""))
             for item, row in tests.items() if row.get("status") != "ok"]  # fmt: skip
    if wrong:
        yield ""
        yield from _table(("test", "status", "reason"), wrong)


def _bench(rows: list[bars.Row], journal: Journal) -> Iterator[str]:
    square = number(journal.rows("facts").get("product", {}).get("tflops"))
    groups: dict[str, list[bars.Row]] = {}
    for row in rows:
        what = f"{row.get('op', '?')}, {row.get('phase', '?')}, {bars.size(row)} {row.get('dtype', '')}"  # noqa: E501
        active, worst = row.get("active", "1"), row.get("worst_over", "sequence")
        what += f", {number(active):.0%} active" if number(active) < 1 else ""
        what += f", worst over {worst}" if row.get("op") == "roma_loss" else ""
        what += f", {row['what']}" if row.get("what") else ""
        groups.setdefault(what, []).append(row)
    for what, group in groups.items():
        absent = [r for r in group if r.get("reason", "").startswith("not here: ")]
        yield from _section(
            f"Benchmark: {what}",
            ("provider", "ms p50", "p20–p80", "× ours", "TFLOP/s", "% of the product", "MiB",
             "logp rms", "reason"),
            [_bench_cells(row, square) for row in sorted(group, key=_by_time)
             if row not in absent],
        )  # fmt: skip
        if absent:
            yield ""
            yield "Not here: " + ", ".join(row["provider"] for row in absent) + "."


def _by_time(row: bars.Row) -> float:
    return number(row.get("ms_p50")) if timed(row) else float("inf")


def _bench_cells(row: bars.Row, square: float) -> Cells:
    if not timed(row):
        return (row["provider"], *[""] * 7, row.get("reason", "?"))
    rate = number(row.get("tflops"))
    ratio = _figure(row.get("ratio"))
    if row.get("ratio_low") and row["provider"] != bars.OURS:
        ratio += f" [{_figure(row['ratio_low'])}, {_figure(row.get('ratio_high'))}]"
    share = f"{100 * rate / square:.1f}" if rate > 0 and square > 0 else ""
    return (
        row["provider"], _figure(row["ms_p50"]),
        f"{_figure(row.get('ms_p20'))}–{_figure(row.get('ms_p80'))}", ratio,
        f"{rate:.4g}" if rate > 0 else "", share,
        row.get("extra_mib", ""), row.get("logp_rms", ""), row.get("reason", ""),
    )  # fmt: skip


def _sweep(journal: Journal, changes: list[str]) -> Iterator[str]:
    found = {item: row for step in winners.STEPS for item, row in journal.rows(step).items()}
    if not found:
        return
    yield ""
    yield "## Sweep"
    yield ""
    yield from [f"* {change}" for change in changes] or ["Nothing beats the present table."]
    best = [
        (item, f"{number(row.get('ms')):.4g}", _interval(row), _figure(row.get("tflops")),
         _figure(row.get("registers")), row.get("status", "?"), row.get("reason", ""))
        for item, row in sorted(found.items(), key=lambda pair: _race(pair[1]))
        if number(row.get("ms")) > 0
    ]  # fmt: skip
    if best:
        yield ""
        yield from _table(
            ("timed", "ms", "× present", "TFLOP/s", "registers", "status", "reason"), best
        )
    refused = [
        (item, row.get("status", "?"), row.get("reason", ""))
        for item, row in found.items()
        if row.get("status") not in ("ok", None) and not number(row.get("ms")) > 0
    ]
    if refused:
        yield ""
        yield from _table(("not timed", "status", "reason"), refused)


def _race(row: dict[str, Any]) -> tuple[str, float]:
    """Points of one role together, the fastest first; the plans of one kernel and size together."""
    names = ("plan_of", "rows") if "plan_of" in row else ("kernel", "role")
    ratio = number(row.get("ratio"))
    return " ".join(str(row.get(name)) for name in names), ratio if ratio == ratio else float("inf")


def _interval(row: dict[str, Any]) -> str:
    return f"{number(row.get('ratio')):.3f} [{number(row.get('ratio_low')):.3f}, " \
           f"{number(row.get('ratio_high')):.3f}]"  # fmt: skip


def _profile(journal: Journal) -> Iterator[str]:
    found = journal.rows("profile")
    times = [(item.removeprefix("time: "), _figure(row.get("calls")), _figure(row.get("ms")),
              _figure(row.get("percent")))
             for item, row in found.items() if item.startswith("time: ")]  # fmt: skip
    times.sort(key=lambda cells: -number(cells[2]))
    counters = {item: row for item, row in found.items() if not item.startswith("time: ")}
    yield from _section(
        "Profile: kernels of one call of the whole loss", ("kernel", "calls", "ms", "%"), times
    )
    names = [n for n in dict.fromkeys(name for row in counters.values() for name in row)
             if n not in (*_OWN, "status")]  # fmt: skip
    cells = [(n, *(_figure(row.get(n, "")) for row in counters.values())) for n in names]
    yield from _section("Profile: counters", ("counter", *counters), cells)


def _section(title: str, head: Cells, cells: Iterable[Cells]) -> Iterator[str]:
    rows = list(cells)
    if rows:
        yield ""
        yield f"## {title}"
        yield ""
        yield from _table(head, rows)


def _table(head: Cells, rows: Sequence[Cells]) -> Iterator[str]:
    """A table in Markdown, without columns that nobody fills."""
    used = [i for i in range(len(head)) if any(str(row[i]) for row in rows)]
    yield "| " + " | ".join(_cell(head[i]) for i in used) + " |"
    yield "|" + "---|" * len(used)
    for row in rows[:_MOST]:
        yield "| " + " | ".join(_cell(row[i]) for i in used) + " |"
    if len(rows) > _MOST:
        yield ""
        yield f"And {len(rows) - _MOST} more in {NUMBERS}."


def _cell(value: object) -> str:
    """One line that is no table of its own."""
    text = " ".join(_figure(value).split()).replace("|", "\\|")
    return text if len(text) <= 200 else text[:197] + "…"


def _figure(value: object) -> str:
    """Four digits of a number; anything else as it is."""
    if isinstance(value, str):
        return f"{float(value):.4g}" if _decimal(value) else value
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or value != int(value) else f"{value:.0f}"
    return "" if value is None else str(value)


def _decimal(text: str) -> bool:
    return text.replace(".", "", 1).isdigit() and "." in text and text.count(".") == 1
