"""Compiles every kernel for every chip as it is launched; needs no GPU.

    python -m bench.compiled            writes the tables of docs/KERNELS.md
    python -m bench.compiled --check    compiles only
    python -m bench.compiled --tritons  every combination, under every Triton: one more table

What is compiled is what launches: bench/compiled/launches.py. All exit with 1 if a kernel does not
compile, spills registers, exceeds its chip's shared memory, or does not use the chip's matrix
instructions.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import triton

from bench.compiled import document, tritons
from bench.compiled.build import faults, make_all
from bench.compiled.cases import calls
from bench.compiled.chips import CHIPS
from bench.compiled.document import Built
from bench.compiled.launches import recorded


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="compile only, write nothing")
    parser.add_argument("--chips", nargs="*", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument(
        "--every", action="store_true", help="every combination of options, not the hardest alone"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a summary there, no table")
    parser.add_argument(
        "--tritons",
        nargs="*",
        metavar="VERSION",
        help=f"--every under each of these, by default {' '.join(tritons.VERSIONS)}",
    )
    options = parser.parse_args()
    if options.tritons is not None:
        return _under_each(options)
    started = time.monotonic()
    built, wrong = _built(options)
    print(f"Triton {triton.__version__}: {time.monotonic() - started:.0f} s", flush=True)
    if options.json:
        chips = {
            chip: {"kernels": len(rows), "faults": wrong[chip]} for chip, rows in built.items()
        }
        options.json.write_text(json.dumps({"triton": triton.__version__, "chips": chips}))
    elif not options.check:
        document.write(compiled=document.compiled(built), epilogues=document.epilogues())
    return 1 if any(wrong.values()) else 0


def _built(options: argparse.Namespace) -> tuple[dict[str, Built], dict[str, list[str]]]:
    """What was compiled for each chip, and the faults in words, which are printed as they come."""
    torch.set_num_threads(1)
    jobs = [
        (chip, launch)
        for chip in options.chips
        for launch in recorded(chip, CHIPS[chip].target, calls(chip, every=options.every))
    ]
    left = Counter(chip for chip, _ in jobs)
    built: dict[str, Built] = {chip: [] for chip in options.chips}
    wrong: dict[str, list[str]] = {chip: [] for chip in options.chips}
    for (chip, launch), made in zip(jobs, make_all(jobs, options.processes), strict=True):
        built[chip].append((launch, made))
        for fault in faults(launch, made, CHIPS[chip]):
            tile = f" {launch.tile}" if launch.is_product else ""
            wrong[chip].append(f"{launch.label}{tile}: {fault} ({launch.variant})")
            print(f"{chip} {wrong[chip][-1]}", file=sys.stderr, flush=True)
        if len(built[chip]) == left[chip]:
            print(f"{chip}: {left[chip]} kernels, {len(wrong[chip])} faults", flush=True)
    return built, wrong


def _under_each(options: argparse.Namespace) -> int:
    arguments = ["--every", "--processes", str(options.processes), "--chips", *options.chips]
    versions = options.tritons or tritons.VERSIONS
    summaries = [tritons.summary(version, arguments) for version in versions]
    table = document.matrix(summaries, datetime.date.today().isoformat())
    print(table)
    if not options.check:
        document.write(tritons=table)
    return 1 if any(c["faults"] for s in summaries for c in s["chips"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
