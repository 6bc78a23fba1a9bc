"""The same under every Triton that the package allows, each in a folder of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def folder(version: str) -> Path:
    """Where a Triton is installed: beside this environment's own packages, not among them."""
    return Path(sys.prefix, "tritons", version)


def installed(version: str) -> Path | None:
    """The folder of a Triton, installed if it is not there; None for this environment's own."""
    if version == triton.__version__:
        return None
    target = folder(version)
    if not target.exists():
        print(f"installing Triton {version} into {target}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            new = Path(scratch, version)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", new]
            subprocess.run([*pip, f"triton=={version}"], check=True)
            new.rename(target)  # whole or not at all
    return target


def summary(version: str, arguments: list[str]) -> dict[str, Any]:
    """What `python -m bench.compiled --json` says under a Triton.

    Raises:
        subprocess.CalledProcessError: it ended without a report.
    """
    own = installed(version)
    environment = dict(os.environ)
    if own is not None:
        found = (str(own), os.environ.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-W", "ignore", "-m", "bench.compiled", "--json", str(report)]
        ran = subprocess.run([*command, *arguments], env=environment)
        if not report.exists():
            raise subprocess.CalledProcessError(ran.returncode, command)
        return json.loads(report.read_text())
