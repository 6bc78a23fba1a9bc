"""`python -m experiments.digits`, which `make demo` calls."""

import argparse

from experiments.digits.arms import METHODS
from experiments.digits.demo import run_demo


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.digits",
        description="Makes the data, warm-starts a small Qwen3-VL, trains GRPO, naive augmentation "
        "and ROMA for each seed, evaluates them on clean and degraded images, and writes "
        "report.html and report.json to --out.",
    )
    parser.add_argument("--out", default="runs/demo", help="run folder (runs/demo)")
    parser.add_argument("--seeds", default="0,1,2", help="run seeds (0,1,2)")
    parser.add_argument(
        "--methods",
        default="",
        metavar="NAMES",
        help=f"methods beside the five arms, which are not run again: {', '.join(METHODS)}",
    )
    options = parser.parse_args()
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        run_demo(options.out, seeds=seeds, methods=options.methods.split())
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":  # the demo's processes import this module again
    main()
