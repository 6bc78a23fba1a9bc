"""Starts what a test runs in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**added: str) -> dict[str, str]:
    """With the repository's packages, and what PYTHONPATH had (the repair of torchvision)."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "USE_HF": "1"}
    return os.environ | plain | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | added


def run(*words: object, **added: str) -> "subprocess.CompletedProcess[str]":
    """A command in the environment's Python."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(**added),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
