"""The way of a batch under verl's v1 trainer: TransferQueue, Ray, a worker of its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from verl_stack import cases


@pytest.mark.slow
def test_a_worker_under_ray_reads_its_rows_from_the_queue(tmp_path):
    """The same bits as in this process; what the reward function said is among the fields."""
    worker = cases.worker()
    given = cases.with_old(worker, cases.rows())
    store = tmp_path / "rows.pt"
    torch.save(given, store)
    worker.set_loss_fn(cases.loss_of(cases.actor()))
    want = worker.train_mini_batch(cases.batch(given, mini_batch_size=6))["metrics"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ["PYTHONPATH"]])
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "verl_stack.under_ray", str(store)],
        env={**os.environ, "ROMA_TEST_MODEL": str(cases.folder()), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    (line,) = [line for line in made.stdout.splitlines() if line.startswith("said ")] or [None]
    assert line is not None, made.stdout[-2000:] + made.stderr[-2000:]
    said = json.loads(line.removeprefix("said "))
    assert said["roma/penalty_worst"][0] > 0 and len(said) > 5
    assert said == {name: [float(x) for x in want[name]] for name in said}
