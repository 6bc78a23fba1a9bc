"""`python -m experiments.science [STAGE …]`, which `make science` calls."""

import argparse
from pathlib import Path

from rich.console import Console

from experiments.science.stages import STAGES, run_stages


def main() -> None:
    """Runs the stages, in their order; what is finished is not run again."""
    stages = "; ".join(f"{name}: {stage.what}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.science",
        description="Trains, measures and compares; writes the CSV files, figures and pages of "
        f"docs/SCIENCE.md. Stages: {stages}.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="some of them; none: all")
    parser.add_argument("--out", default="runs/science", help="folder of the runs (runs/science)")
    options = parser.parse_args()
    try:
        run_stages(options.stages, Path(options.out), Console())
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":  # the runs' processes import this module again
    main()
