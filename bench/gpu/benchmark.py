"""Run as a program: the benchmark within a time.

    python -m bench.gpu.benchmark PRESET DEVICE MINUTES CSV [FIRST]

As `python -m bench --preset PRESET --minutes MINUTES --resume --out CSV`, but FIRST variants alone
if that is given. Ends with journal.MORE if time was over before all was done.
"""

import argparse
import sys
import time
from pathlib import Path

from bench.gpu.journal import MORE
from bench.job import Options
from bench.run import run
from bench.variants import plan

END = 0.2  # minutes for the end of what is running


def main(preset: str, device: str, minutes: float, out: Path, first: int | None) -> int:
    """Entry point."""
    minutes = max(minutes - END, 0.1)
    until = time.monotonic() + 60 * minutes
    # Without a GPU the benchmark's machinery is what runs, not a comparison.
    few = {} if device == "cuda" else {"providers": ("naive fp32",), "with_memory": False}
    how = Options.of(preset, device, **few)
    run(plan(preset, device)[:first], how, out, resume=True, minutes=minutes)
    return MORE if time.monotonic() > until else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("minutes", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("first", type=int, nargs="?")
    sys.exit(main(**vars(parser.parse_args())))
