"""One run: plan, gate, interleaved timing, memory, CSV, and a live table meanwhile."""

import sys
from collections.abc import Iterable
from pathlib import Path

from bench import memory, results
from bench.gate import Wrong
from bench.measure import Clock, Run, interleave
from bench.ops import ACTIVE, Bench, bench_of
from bench.providers import OURS, Unavailable
from bench.results import Row
from bench.variants import Variant

BUDGET = {
    "smoke": (3, 1.0),
    "quick": (7, 10.0),
    "full": (9, 15.0),
    "paper": (9, 6.0),
    "views": (15, 15.0),
}
"""By preset: rounds, and the seconds after which a variant gets no further round."""


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


def run(
    variants: Iterable[Variant],
    device: str,
    out: Path,
    *,
    preset: str,
    providers: list[str] | None = None,
    with_memory: bool = True,
    resume: bool = False,
) -> list[Row]:
    """Measures the variants and writes `out` after each; `resume` skips those that it holds."""
    live, clock = Live(), Clock(device)
    rows = results.read(out) if resume and out.exists() else []
    where = results.machine(device)
    live.line(f"{where['machine']}, torch {where['torch']}, commit {where['commit']}")
    for variant in variants:
        columns = results.variant_columns(variant)
        if any(row.get("ms_p50") and columns.items() <= row.items() for row in rows):
            continue
        live.line(f"\n{variant}")
        live.doing("data and float64")
        bench = bench_of(variant, device)
        shared = where | columns
        candidates, refused = _candidates(bench, providers, live)
        rows += [shared | {"provider": name, "reason": why} for name, why in refused.items()]
        if OURS in candidates:
            made = _measure(bench, candidates, clock, live, preset, with_memory)
            rows += [shared | row for row in made]
        for name, why in refused.items():
            if not (name.endswith(ACTIVE) and name.removesuffix(ACTIVE) in refused):
                live.line(f"  {name:22} {why}")
        results.write(out, rows)
    return rows


def _measure(
    bench: Bench,
    candidates: dict[str, Run],
    clock: Clock,
    live: Live,
    preset: str,
    with_memory: bool,
) -> list[Row]:
    """Times and memory of the candidates, fastest first."""
    rounds, seconds = BUDGET[preset]
    timed = candidates | {results.YARDSTICK: bench.yardstick}
    times = interleave(timed, clock, rounds=rounds, seconds=seconds, tell=live.doing)
    data = bench.describe()
    live.line(HEADER)
    made = []
    for name in sorted(candidates, key=lambda n: times[n].quantile(0.5)):
        extra = None
        if with_memory and bench.variant.memory:
            live.doing(f"memory of {name}")
            try:
                extra = memory.extra_mib(bench.variant.line, name, clock.device)
            except RuntimeError as why:
                live.line(f"  memory of {name}: {why}")
        executed = bench.executed() if name == OURS else None
        row = results.measured(bench, name, times, executed=executed, extra_mib=extra, data=data)
        made.append(row)
        live.line(_line(row))
    return made


def _candidates(
    bench: Bench, providers: list[str] | None, live: Live
) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that can be timed, and why the others cannot."""
    found: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name in bench.names:
        if providers is not None and name not in (*providers, OURS):
            continue
        live.doing(f"{name}: compared with float64")
        try:
            found[name] = bench.run(name)
        except (Unavailable, ImportError) as why:
            refused[name] = f"not here: {why}"
        except Wrong as why:
            refused[name] = f"refused: {why}"
    return found, refused


HEADER = (
    f"  {'provider':22} {'ms p50':>9} {'p20–p80':>17} {'× ours':>22} {'TFLOP/s':>8} {'MiB':>7} "
    f"{'logp rms':>9} {'worst view':>10}"
)


def verdict(row: Row) -> str:
    """The ratio to ours with its interval; “level” if the interval contains 1."""
    low, high = float(row["ratio_low"]), float(row["ratio_high"])
    if row["provider"] == OURS:
        return "1"
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
