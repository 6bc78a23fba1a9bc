"""examples/patched_sft.py runs and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_learns() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "patched_sft.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    losses = [float(found) for found in re.findall(r"loss ([\d.]+) nats", done.stdout)]
    # 5.5 nats are those of 256 equal bytes, 3.4 about those of the bytes' frequencies.
    assert len(losses) == 5 and losses[-1] < 3.5 < losses[0], done.stdout
