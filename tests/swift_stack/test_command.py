"""The command as a user types it, with the plug-in file: examples/swift/run.sh."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from swift_stack.launch import ROOT, environment, run


def test_the_plugin_prints_where_it_is():
    made = run("-m", "roma.integrations.swift")
    assert made.returncode == 0, made.stderr
    assert Path(made.stdout.strip()) == ROOT / "roma/integrations/swift/plugin.py"


def command(out, **added):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", str(ROOT / "examples/swift/run.sh"), str(out)],
        env=environment(PATH=path, STEPS="5", **added),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_example_runs_with_views(tmp_path):
    made = command(tmp_path)
    assert made.returncode == 0, made.stderr[-3000:]
    logged = re.findall(r"'roma/penalty_worst': '([^']+)'", made.stdout + made.stderr)
    assert logged and float(logged[0]) >= 0


@pytest.mark.slow
def test_a_mistake_ends_the_command_before_training(tmp_path):
    made = command(tmp_path, ROMA_ACCURACY_REWARD="format")
    assert made.returncode != 0
    said = made.stdout + made.stderr
    assert "ValueError: accuracy_reward: expected one of the rewards NamesTheSide" in said
    assert "'grad_norm':" not in said
