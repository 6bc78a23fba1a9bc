"""Everything that a card must show, most valuable first: `make gpu`, docs/GPU.md.

    python -m bench.gpu                     runs every step, to runs/gpu
    python -m bench.gpu --plan              prints order, expected time and calls, runs nothing
    python -m bench.gpu --minutes 9.5       starts nothing that would not end in time
    python -m bench.gpu --resume [FILE]     goes on, from the folder or from its gpu-results.tar.gz
    python -m bench.gpu --only facts,correct

Without a card each step takes its form for a CPU, if it has one.
"""

import argparse
import datetime
import math
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu import budget, runner, steps, table, winners
from bench.gpu.journal import Journal
from bench.processes import ROOT, commit, stop_on

ENDINGS = ("failed", "timeout")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 if something failed that could run."""
    begin = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    only = set(options.only.split(",")) if options.only else None
    known = steps.names()
    if only and not {name.partition(":")[0] for name in only} <= set(known):
        parser.error(f"--only: expected some of {', '.join(known)}, got {options.only}")
    try:
        machine = steps.probe(options.device)
        every = steps.steps(machine, options.out)
        there = {f"{step.name}:{part.name}" for step in every for part in step.parts}
        if only and not only <= there | set(known):
            parser.error(f"--only: expected parts of {sorted(there)}, got {options.only}")
        chosen = list(budget.chosen(every, only))
        if options.list or options.plan:
            print("\n".join(_list(chosen) if options.list else _plan(chosen, options)))
            return 0
        _prepare(options)
    except ValueError as wrong:
        parser.error(str(wrong))
    seconds = options.minutes * 60 - (time.monotonic() - begin) if options.minutes else math.inf
    run = runner.Runner(options.out, seconds)
    run.journal.append(
        "call", time=datetime.datetime.now().isoformat(" ", "seconds"), device=machine.device,
        commit=commit(), retry=options.retry, arguments=shlex.join(arguments or sys.argv[1:]),
    )  # fmt: skip
    stop_on(signal.SIGTERM, signal.SIGINT)
    try:
        run.run(chosen)
    except KeyboardInterrupt:
        run.pack()
        print(f"stopped; --resume goes on from {options.out}")
        return 130
    return _ending(run, chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="print order, time and calls only")
    parser.add_argument("--list", action="store_true", help="print the steps only")
    parser.add_argument("--minutes", type=float, help="how long this call may take")
    parser.add_argument(
        "--call-minutes", type=float, default=9.5, help="--plan: how long a call may take"
    )
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="FILE",
        help="go on from --out, or from a file gpu-results.tar.gz",
    )  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="--resume: what failed, once more")
    parser.add_argument("--only", metavar="STEP[:PART],…", help="these steps or parts alone")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="FOLDER")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a card if there is one")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    """Brings the folder into the state from which this call starts."""
    options.out = options.out.resolve()  # parts run in the checkout's root
    if isinstance(options.resume, str):
        runner.unpack(Path(options.resume), options.out)
    elif options.resume:
        if not (options.out / runner.JOURNAL).exists():
            raise ValueError(f"--resume: expected results in {options.out}, found none")
    else:
        aside = runner.set_aside(options.out)
        if aside:
            print(f"earlier results: {aside}")


def _list(chosen: list[budget.Step]) -> list[str]:
    return [f"{step.name:10} {step.what}" for step in chosen]


def _plan(chosen: list[budget.Step], options: argparse.Namespace) -> list[str]:
    """Order, expected seconds, and the call in which each part runs."""
    journal = Journal(options.out / runner.JOURNAL if options.resume else Path("/nonexistent"))
    waiting, spent = [], {}
    for step in chosen:
        left = tuple(p for p in step.parts if not journal.over(step.name, p.name))
        waiting.append(budget.Step(step.name, step.what, left))
        spent |= {(step.name, p.name): journal.spent(step.name, p.name) for p in left}
    calls = budget.calls(waiting, options.call_minutes * 60, spent)
    when: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for number, call in enumerate(calls, 1):
        for step, part, seconds in call:
            when.setdefault((step, part), []).append((number, seconds))
    lines = [f"{'step':10} {'part':34} {'seconds':>8}  call"]
    for step in waiting:
        for part in step.parts:
            if part.absent:
                lines.append(f"{step.name:10} {part.name:34} {'–':>8}  skipped: {part.absent}")
                continue
            runs = when[step.name, part.name]
            total = sum(seconds for _, seconds in runs)
            in_calls = ", ".join(str(number) for number, _ in runs)
            lines.append(f"{step.name:10} {part.name:34} {total:8.0f}  {in_calls}")
    total = sum(seconds for call in calls for *_, seconds in call)
    lines.append(f"{total / 60:.1f} minutes, {len(calls)} calls of {options.call_minutes:g}")
    for number, call in enumerate(calls, 1):
        needs = budget.START + sum(seconds + budget.PACK for *_, seconds in call)
        first = "" if number == 1 else " --resume"
        lines.append(
            f"call {number}: {needs / 60:.1f} minutes: "
            f'make gpu ARGS="--minutes {options.call_minutes:g}{first}"'
        )
    return lines


def _ending(run: runner.Runner, chosen: list[budget.Step]) -> int:
    """Prints what is left and what failed."""
    ends: dict[str, Any] = {}
    for step in chosen:
        for part in step.parts:
            end = run.journal.end(step.name, part.name) or {}
            ends[f"{step.name}, {part.name}"] = end.get("status", "not started")
    wrong = [name for name, status in ends.items() if status in ENDINGS]
    left = [name for name, status in ends.items() if status in ("cut", "not started")]
    for change in winners.table(run.journal)[1]:
        print(f"tuning.json: {change}")
    print(f"\n{run.out / table.PAGE}")
    if left:
        print(f"left for --resume: {'; '.join(left)}")
    if wrong:
        print(f"failed: {'; '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
