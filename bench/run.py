"""One run: a worker measures; this process supervises it, writes the CSV, shows a live table.

Whatever a candidate does, ours included, costs its own row alone: it raises, runs out of memory, is
wrong, hangs, or ends its process. After the last two a new worker does the rest without it.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench import results
from bench.job import Job, Options
from bench.ops import ACTIVE, BASE
from bench.providers import OURS
from bench.results import Row
from bench.supervise import Cut, Event, Fault, Worker
from bench.variants import Variant

TRIES = 2  # workers in a row that may end before they do anything


class Live:
    """Prints the table's lines, and a status line that is overwritten."""

    def __init__(self) -> None:
        self._over = sys.stdout.isatty()

    def doing(self, what: str) -> None:
        """Shows what is running, if stdout is a terminal."""
        if self._over:
            print(f"\r\033[K  … {what}", end="", flush=True)

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        print(("\r\033[K" if self._over else "") + text, flush=True)


@dataclass
class Progress:
    """How far the variant at hand has come."""

    gone: dict[str, str]
    names: list[str] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    begun: bool = False


class Supervisor:
    """A run: the variants left, the rows so far, and what its worker is doing."""

    def __init__(self, options: Options, variants: list[Variant], rows: list[Row], out: Path):
        """`rows`: of an earlier run; `out`: the CSV."""
        self.options = options
        self.rows = rows
        self._out = out
        self._live = Live()
        self._left = [v for v in variants if not _timed(v, rows)]
        self._progress = Progress(_gone(self._left[0], rows)) if self._left else None
        self._machine: Row | None = None
        self._current: Event | None = None
        self._idle = 0

    def run(self, until: float) -> bool:
        """Measures until all is done, or the moment `until`; whether all is done."""
        while self._left:
            before = self._state()
            try:
                with Worker(self._job()) as worker:
                    for event in worker.events(until):
                        self._hear(event)
            except Cut:
                self._live.line(f"\ntime is over: {len(self._left)} variants are left (--resume)")
                return False
            except Fault as fault:
                self._blame(str(fault), before)
        return True

    def _state(self) -> tuple[int, int, int]:
        """Grows with everything that a worker gets done."""
        rounds = len(self._progress.rounds) if self._progress else 0
        return -len(self._left), len(self.rows), rounds

    def _job(self) -> Job:
        assert self._progress is not None
        self._current = None
        return Job(
            self.options,
            list(self._left),
            [dict(self._progress.gone), *(_gone(v, self.rows) for v in self._left[1:])],
            list(self._progress.rounds),
            dict(self._progress.errors),
            machine=self._machine is None,
        )

    def _hear(self, event: Event) -> None:
        """Takes in what the worker says."""
        progress = self._progress
        if event["event"] == "machine":
            columns: Row = event["columns"]
            self._machine = columns
            known = {"machine": "?", "torch": "?", "commit": "?"} | columns
            self._live.line("{machine}, torch {torch}, commit {commit}".format(**known))
        elif event["event"] == "note":
            self._live.line(f"  {event['text']}")
        elif event["event"] == "start":
            self._current = event
            self._live.doing(": ".join(x for x in (event["name"], event["what"]) if x))
        elif progress is not None:
            self._hear_of_variant(event, progress)

    def _hear_of_variant(self, event: Event, progress: Progress) -> None:
        variant = self._left[0]
        if event["event"] == "variant":
            if not progress.begun:
                self._live.line(f"\n{variant}")
            progress.begun, progress.names = True, event["names"]
        elif event["event"] == "held":
            progress.errors[event["name"]] = event["errors"]
        elif event["event"] == "refused":
            self._current = None
            self._refuse(event["name"], event["reason"], held=event["held"])
        elif event["event"] == "no data":
            self._current = None
            self._refuse_all(event["reason"])
        elif event["event"] == "round":
            progress.rounds.append(event["ms"])
        elif event["event"] == "rows":
            self._live.line(HEADER)
            for row in event["rows"]:
                self._live.line(_line(results.variant_columns(variant) | row))
            self._add(event["rows"])
        elif event["event"] == "memory":
            self._remember(event["name"], event["extra_mib"])
        elif event["event"] == "done":
            self._current = None
            self._next()

    def _next(self) -> None:
        self._left.pop(0)
        self._progress = Progress(_gone(self._left[0], self.rows)) if self._left else None

    def _blame(self, reason: str, before: tuple[int, int, int]) -> None:
        """A row for what ended the worker."""
        progress, current = self._progress, self._current
        assert progress is not None
        if current is not None and current["name"]:
            name = current["name"]
            if current["what"] == "memory":
                self._live.line(f"  memory of {name}: {reason}")
                self._next()
            else:
                self._refuse(name, reason, held=current["held"])
        elif progress.begun and (current is not None or self._state() == before):
            self._refuse_all(f"no data: {reason}")
            self._next()
        elif self._state() == before:
            self._idle += 1
            if self._idle == TRIES:
                raise RuntimeError(f"no worker starts: the last one {reason}")
            return
        self._idle = 0

    def _refuse(self, name: str, reason: str, *, held: bool) -> None:
        """`held`: the comparison with float64 failed, so the same function goes no further."""
        assert self._progress is not None
        rows = []
        for other in dict.fromkeys((name, name + ACTIVE) if held else (name,)):
            if other == name or (
                other in self._progress.names and other not in self._progress.gone
            ):
                rows.append({"provider": other, "reason": reason})
                self._progress.gone[other] = reason
        self._live.line(f"  {name:22} {reason}")
        self._add(rows)

    def _refuse_all(self, reason: str) -> None:
        """All candidates of the variant that have no row yet."""
        assert self._progress is not None
        columns = results.variant_columns(self._left[0])
        have = {r["provider"] for r in self.rows if columns.items() <= r.items()}
        self._live.line(f"  {reason}")
        left = [name for name in self._progress.names if name not in have]
        self._add([{"provider": name, "reason": reason} for name in left])

    def _add(self, rows: list[Row]) -> None:
        """Rows of the variant at hand, on disk when this returns."""
        shared = (self._machine or {}) | results.variant_columns(self._left[0])
        self.rows += [shared | row for row in rows]
        results.write(self._out, self.rows)

    def _remember(self, name: str, extra_mib: str) -> None:
        columns = results.variant_columns(self._left[0]) | {"provider": name}
        for row in self.rows:
            if columns.items() <= row.items():
                row["extra_mib"] = extra_mib
        self._live.line(f"  {name:22} {extra_mib} MiB")
        results.write(self._out, self.rows)


def run(
    variants: Iterable[Variant],
    options: Options,
    out: Path,
    *,
    resume: bool = False,
    retry: bool = False,
    minutes: float | None = None,
) -> list[Row]:
    """Measures the variants; `out` has every row as soon as there is one.

    Args:
        variants: what to measure, in this order.
        options: how.
        out: the CSV.
        resume: whether to keep what it holds: a variant that has times is done, and in another
            one a candidate that has a reason is not tried again.
        retry: with `resume`: whether to measure a variant again that has a reason other than
            "not here".
        minutes: after which the run stops; a variant that is cut gets no times.

    Raises:
        RuntimeError: no worker starts on this machine.
    """
    wanted = list(variants)
    rows = results.read(out) if resume and out.exists() else []
    if retry:
        faulty = [results.variant_columns(v) for v in wanted if _faulty(v, rows)]
        rows = [row for row in rows if not any(f.items() <= row.items() for f in faulty)]
    until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    supervisor = Supervisor(options, wanted, rows, out)
    supervisor.run(until)
    return supervisor.rows


def _of(variant: Variant, rows: list[Row]) -> list[Row]:
    columns = results.variant_columns(variant)
    return [row for row in rows if columns.items() <= row.items()]


def _timed(variant: Variant, rows: list[Row]) -> bool:
    return any(row.get("ms_p50") for row in _of(variant, rows))


def _gone(variant: Variant, rows: list[Row]) -> dict[str, str]:
    return {row["provider"]: row["reason"] for row in _of(variant, rows) if row.get("reason")}


def _faulty(variant: Variant, rows: list[Row]) -> bool:
    return any(not why.startswith("not here") for why in _gone(variant, rows).values())


HEADER = (
    f"  {'provider':22} {'ms p50':>9} {'p20–p80':>17} {'ratio':>22} {'TFLOP/s':>8} {'MiB':>7} "
    f"{'logp rms':>9} {'worst view':>10}"
)


def verdict(row: Row) -> str:
    """The ratio with its interval; “level” if it contains 1; “–” if the base has no time."""
    if row["provider"] == BASE.get(row.get("op", ""), OURS):
        return "1"
    if not row.get("ratio"):
        return "–"
    low, high = float(row["ratio_low"]), float(row["ratio_high"])
    text = f"{float(row['ratio']):.2f} [{low:.2f}, {high:.2f}]"
    return text + " level" if low <= 1 <= high else text


def _line(row: Row) -> str:
    between = f"{float(row['ms_p20']):.4g}–{float(row['ms_p80']):.4g}"
    agreement = row.get("worst_view", "")
    agreement = "" if agreement in ("", "nan") else f"{float(agreement):.1%}"
    rate = f"{float(row['tflops']):.3g}" if float(row["tflops"]) else ""
    return (
        f"  {row['provider']:22} {float(row['ms_p50']):>9.4g} {between:>17} {verdict(row):>22} "
        f"{rate:>8} {row['extra_mib']:>7} {row.get('logp_rms', ''):>9} {agreement:>10}"
    )
