"""Every rank has an engine of its own, in the group that the trainer's launcher made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_engine.model import folder

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks():
    paths = [
        str(ROOT),
        str(ROOT / "kernels"),
        str(ROOT / "tests"),
        os.environ.get("PYTHONPATH", ""),
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    made = subprocess.run(
        [sys.executable, "-m", *launcher, str(Path(__file__).with_name("two_ranks.py")), folder()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    rows = [json.loads(line) for line in made.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted((row["rank"], row["rows"]) for row in rows) == [(0, 8), (1, 4)]
    assert all(value < 1e-4 for row in rows for value in row["mismatch"])
