"""The CSV: one row per candidate and variant, with machine, versions, sizes and times."""

import csv
import os
import platform
import re
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from bench.gate import Errors
from bench.measure import Clock, Times
from bench.ops import BASE, Bench
from bench.providers import OURS, version_of
from bench.variants import Variant

FOLDER = Path(__file__).parent / "results"
Row = dict[str, str]
YARDSTICK = "yardstick"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def machine(device: str) -> dict[str, str]:
    """Date, commit, machine and versions: the first columns of every row."""
    gpu = {}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        name = about.name
        gpu = {
            "multiprocessors": str(about.multi_processor_count),
            "l2_mib": f"{getattr(about, 'L2_cache_size', 0) / 2**20:.0f}",
        }
    else:
        found = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
        name = f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
    # What a run writes is not a change of the code.
    changed = _git("-C", "..", "status", "--porcelain", "-uno", "--", ".", ":!bench/results")
    dirty = str(bool(changed)) if _git("rev-parse", "HEAD") else "-"
    return {
        "date": date.today().isoformat(),
        "commit": os.environ.get("ROMA_COMMIT") or _git("rev-parse", "--short", "HEAD") or "-",
        "dirty": dirty,
        "device": device,
        "machine": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "copy_gb_s": f"{copy_rate(device):.3g}",
        **gpu,
    }


def copy_rate(device: str) -> float:
    """GB/s read and written by a copy of 256 MiB: the median of seven."""
    clock, source = Clock(device), torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    times = sorted(clock.time(lambda: (target.copy_(source), None)[1]) for _ in range(7))
    return 2 * source.nbytes / times[3] / 1e6


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def variant_columns(variant: Variant) -> dict[str, str]:
    """The columns that say what was measured."""
    found = asdict(variant)
    del found["among"]
    return {name: f"{x:g}" if isinstance(x, float) else str(x) for name, x in found.items()}


def measured(
    bench: Bench,
    name: str,
    times: dict[str, Times],
    *,
    executed: float | None,
    extra: float | None,
    needs: float,
) -> Row:
    """The columns of a candidate that was timed; ratios are empty where their base has no time.

    Args:
        bench: of the variant.
        name: the candidate.
        times: of all candidates, and of the yardstick if it has some.
        executed: FLOP of the products that our kernels report, if it is one of ours.
        extra: bytes measured, or None.
        needs: bytes estimated, or 0.
    """
    mine, units = times[name], times.get(YARDSTICK)
    seconds = mine.quantile(0.5) / 1e3
    row = {
        "provider": name,
        "version": version_of(bench.package(name)),
        "rounds": str(len(mine.ms)),
        **{f"ms_p{p}": f"{mine.quantile(p / 100):.4g}" for p in (20, 50, 80)},
        **_over("ratio", mine, times.get(BASE.get(bench.variant.op, OURS))),
        **_over("yardsticks", mine, units),
        "useful_gflop": f"{bench.flop / 1e9:.4g}",
        "executed_gflop": "" if executed is None else f"{executed / 1e9:.4g}",
        "tflops": f"{bench.flop / seconds / 1e12:.4g}",
        "extra_mib": "" if extra is None else f"{extra / 2**20:.1f}",
        "needs_mib": f"{needs / 2**20:.0f}" if needs else "",
    }
    if bench.flop and units is not None:
        what = bench.variant
        product = 2.0 * (what.views + 1) * what.tokens * what.depth * what.vocab
        rate = product / (units.quantile(0.5) / 1e3)
        row["product_tflops"] = f"{rate / 1e12:.4g}"
        row["percent_of_product"] = f"{100 * bench.flop / seconds / rate:.3g}"
    errors = bench.errors.get(name)
    if isinstance(errors, Errors):
        row |= {key: f"{value:.2e}" for key, value in asdict(errors).items()}
    return row


def _over(column: str, mine: Times, other: Times | None) -> Row:
    """A ratio with its interval."""
    found = ("", "", "") if other is None else [f"{x:.4g}" for x in mine.over(other)]
    return dict(zip((column, f"{column}_low", f"{column}_high"), found, strict=True))


def write(path: Path, rows: list[Row]) -> None:
    """Writes the rows, with every column that any of them has; whole, or not at all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
