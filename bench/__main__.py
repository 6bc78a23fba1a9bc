"""Micro-benchmarks of the loss against every public peer.

    python -m bench                          times everything, writes a CSV to bench/results/
    python -m bench --preset full|paper      longer; paper: the sizes of a 4B policy on a GPU
    python -m bench --preset card            the few lines that decide, for minutes on a GPU
    python -m bench --op roma_loss --providers "naive fp32,liger"
    python -m bench --report                 afterwards the plots, and the tables in docs/
    python -m bench --report CSV             the plots and tables of an earlier run
    python -m bench --against CSV            which times moved since an earlier run, beyond noise

A provider is timed only after it agreed with float64 on this machine, dtype and shape. One that
fails, hangs or takes its process along has a row with the reason. Method and columns:
bench/README.md.
"""

import argparse
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import against, data, report, results
from bench.job import BUDGET, LIMIT, Options
from bench.run import run
from bench.variants import on_states, plan

OPS = ["linear_logprob", "view_loss", "roma_loss", "update_step", "views"]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--preset", choices=list(BUDGET), default="quick")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--providers", help="names, separated by commas; ours is always timed")
    parser.add_argument("--states", metavar="FILE", help="a model's states and head: bench/data.py")
    parser.add_argument(
        "--out", type=Path, metavar="CSV", help="default: results/DEVICE-PRESET.csv"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the CSV already holds")
    parser.add_argument(
        "--retry", action="store_true", help="resume, and measure again where a candidate failed"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory on a CPU")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GiB", help="what a candidate may take at most"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="S",
        help=f"seconds for one thing that a candidate does, then it is killed (default {LIMIT:g})",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="no further round of a variant after them"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="of the whole run; --resume goes on"
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: it may add to bench.providers.PROVIDERS",
    )
    parser.add_argument(
        "--report", nargs="?", type=Path, const=True, metavar="CSV", help="plots, tables in docs/"
    )
    parser.add_argument("--against", type=Path, metavar="CSV", help="compare with an earlier run")
    options = parser.parse_args()
    if isinstance(options.report, Path):
        report.write(options.report)
        return 0
    for module in options.add:
        if find_spec(module) is None:
            parser.error(f"--add: no module {module!r}; PYTHONPATH must hold its folder")
    earlier = results.read(options.against) if options.against else None
    variants = [v for v in plan(options.preset, options.device) if options.op in (None, v.op)]
    if options.states:
        try:
            hidden, weight = data.load(options.states)
        except (OSError, ValueError, pickle.UnpicklingError) as wrong:
            parser.error(f"--states: {wrong}")
        variants = on_states(variants, options.states, *hidden.shape, len(weight))
    out = options.out or results.FOLDER / f"{options.device}-{options.preset}.csv"
    names = options.providers.split(",") if options.providers else None
    budget = {} if options.seconds is None else {"seconds": options.seconds}
    how = Options.of(
        options.preset,
        options.device,
        limit=options.limit,
        providers=names and tuple(names),
        with_memory=not options.no_memory,
        memory_limit=options.memory_limit,
        add=tuple(options.add),
        **budget,
    )
    try:
        rows = run(
            variants,
            how,
            out,
            resume=options.resume or options.retry,
            retry=options.retry,
            minutes=options.minutes,
        )
    except RuntimeError as wrong:
        print(f"\n{wrong}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on. Written so far: {out}", file=sys.stderr)
        return 130
    print(f"\nwritten: {out}")
    if options.report:
        report.write(out)
    if earlier is not None:
        return against.compare(earlier, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
