"""`roma report`: a page about evaluations that were made."""

import argparse
from collections.abc import Callable
from typing import Any

_REPORT = """\
examples:
  roma report runs/eval/mine-charts --out report
  roma report GRPO=runs/eval/grpo ROMA=runs/eval/roma --out report --title "Charts"
  roma report a=runs/bench/a b=runs/bench/b c=runs/bench/c --against b

A RUN is a folder that `roma eval` or `roma bench-vlm` wrote; several hold the same questions.
Writes report.html (one file: no scripts, nothing from outside), report.md and the figures.
"""

Command = Callable[[str, Callable[[argparse.Namespace], None], str, str], Any]


def add_commands(command: Command) -> None:
    """Adds every command of this module."""
    report = command("report", _report, "write a page about one or several evaluations", _REPORT)
    report.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="folders of results")
    report.add_argument("--out", default="report", help="folder to write to (report)")
    report.add_argument("--title", help="of the page (a question that names the model)")
    report.add_argument("--against", metavar="NAME", help="compare with this model (the first)")


def _report(options: argparse.Namespace) -> None:
    from roma.evaluate.report.command import run_report

    written = run_report(
        options.runs, out=options.out, title=options.title, against=options.against
    )
    for path in written:
        print(path)
