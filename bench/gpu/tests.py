"""Run as a program: the tests that need a GPU, a process a test, side by side.

    python -m bench.gpu.tests gpu           what `pytest -m gpu` would run
    python -m bench.gpu.tests interpreted   without a GPU: their forms for a CPU, a process a file

A test that hangs, kills its process or spoils its CUDA context is one line; the others do not meet
it. Most of a test's time is compilation, so that many processes share a GPU well.
"""

import argparse
import os
import re
import subprocess
import sys

from bench.gpu.journal import done, say, start, tell
from bench.processes import ROOT, Outcome, environment, module, pool

SECONDS = 600.0  # of one test
SLOTS = 8  # so many CUDA contexts and heads of full size fit a card's memory
_PYTEST = ("-q", "--no-header", "-p", "no:cacheprovider", "--tb=short")


def main(which: str) -> int:
    """Tells how every test ended that was not told before."""
    marked = ["-m", "gpu"] if which == "gpu" else ["-m", "not gpu"]
    names, said = collect(["tests" if which == "gpu" else "tests/gpu", *marked])
    if which == "interpreted":  # they are small: most of their time would be torch's import
        names = list(dict.fromkeys(name.split("::")[0] for name in names))
    if not names:
        print(said)
        return 1
    earlier = done()
    commands = {
        name: module("pytest", name, *marked, *_PYTEST) for name in names if name not in earlier
    }
    slots = max(1, min(SLOTS, len(os.sched_getaffinity(0)) // 2))
    for name, end, lines in pool(commands, slots=slots, seconds=SECONDS, begin=start):
        status, reason = verdict(end, lines)
        if status != "ok":
            say("\n".join(lines))
        tell(name, status, seconds=round(end.seconds, 1), reason=reason)
    return 0


def collect(selection: list[str]) -> tuple[list[str], str]:
    """The tests' names, and what pytest said."""
    done = subprocess.run(
        module("pytest", *selection, *_PYTEST, "--collect-only"),
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    names = [line for line in done.stdout.splitlines() if re.match(r"\S+\.py::", line)]
    return names, done.stdout + done.stderr


def verdict(end: Outcome, lines: list[str]) -> tuple[str, str]:
    """Status and reason of one test's process."""
    if end.code is None:
        return "timeout", end.reason
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in \d", line)), "")
    if end.code == 0 and "passed" in summary:
        return "ok", ""
    if end.code == 0 and "skipped" in summary:
        why = next((line for line in lines if line.startswith("SKIPPED")), summary)
        return "skipped", why
    if end.code == 1:
        errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
        return "failed", errors[0] if errors else end.last
    return "crashed", end.reason


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["gpu", "interpreted"])
    sys.exit(main(parser.parse_args().which))
