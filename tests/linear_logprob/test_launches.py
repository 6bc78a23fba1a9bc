"""What is launched depends on no data: read off Triton's own rules, for a chip that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from roma import RomaConfig
from roma.testing import compare_whole
from roma.testing.strategies import LossSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def launches() -> dict[str, list[set[str]]]:
    """In a process of its own: the interpreter, in which the tests run, specialises nothing."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/support/launches.py"], cwd=ROOT, capture_output=True, text=True,
        env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: [set(call) for call in calls] for name, calls in json.loads(done.stdout).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("warm", "captured"),
    [
        ("warm-up with few active rows", "captured"),
        ("warm-up of the loss", "the loss captured"),
    ],
)
def test_a_capture_launches_what_was_warmed_up(launches, warm: str, captured: str) -> None:
    """Loading a kernel is forbidden while a CUDA graph is captured, where every row is active."""
    (before,), (inside,) = launches[warm], launches[captured]
    assert inside and inside <= before, sorted(inside - before)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["rows", "batches"])
def test_nothing_is_compiled_anew_for_another_number_of_rows(launches, sizes: str) -> None:
    """Odd, even, divisible by 16: all that a run's batches differ in."""
    first, *others = launches[sizes]
    assert first and all(other == first for other in others), [
        sorted(other ^ first) for other in others if other != first
    ][:1]


@pytest.mark.parametrize("views", [0, 2])
def test_a_capture_loses_no_row(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is captured inactive rows are padding, which must not land on row 0."""
    grads = []
    for captured in (False, True):
        for module in ("backward", "torch_backend", "rows"):
            name = f"roma_kernels.linear_logprob.{module}.capturing"
            monkeypatch.setattr(name, lambda x, told=captured: told)
        config = RomaConfig(lambda_inv=float(views > 0))
        spec = LossSpec(b=3, t=5, k=views, d=8, v=33, config=config)
        case = compare_whole.on_leaves(spec.make())
        compare_whole.call(case, "torch").loss.backward()
        grads.append([case[n].grad for n in compare_whole.LEAVES if case[n] is not None])
    for eager, inside in zip(*grads, strict=True):
        torch.testing.assert_close(inside, eager)
    assert bool(grads[0][0].any())
