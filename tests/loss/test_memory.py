"""What one loss takes: resident memory at a realistic size, and every tensor at a small one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.counting import Watch

import roma
from roma_kernels.linear_logprob import native_backend
from roma_kernels.roma_loss.token_local import op

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "depth", "beyond"), [("torch", 512, 697), ("native", 1024, 361)]
)
def test_peak_memory_of_one_loss(
    engine: str, depth: int, beyond: float, request: pytest.FixtureRequest
) -> None:
    """K = 4, 512 tokens, V = 151,936, bf16.

    torch at D = 512: 400 MiB beyond an fp32 dW of 297; native at D = 1024: 64 beyond a bf16 dW of
    297 (and the states' gradients, of 5). The logits of the five views alone would be 1.5 GiB.
    """
    if engine == "native":
        request.getfixturevalue("compiled")
    program = [
        sys.executable,
        str(ROOT / "tests" / "support" / "peak_memory.py"),
        engine,
        str(depth),
    ]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) <= beyond


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_no_more_than_inputs_gradients_and_workspace(
    worst_over: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 4, half of the rollouts right; the logits alone would be 40 MiB in fp32.

    Beyond the inputs there may be alive at once: the gradients, summed in fp32; the workspace; and
    as much as the inputs again, for the rows that a launch works on side by side.
    """
    k, b, t, d, v, workspace = 4, 4, 64, 64, 8192, 2**20
    monkeypatch.setattr(op, "LEAST_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden, views, weight = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((b, t, d), (k, b, t, d), (v, d))
    )
    mask = torch.ones(b, t, dtype=torch.bool)
    tokens = torch.randint(v, (b, t), generator=generator)
    with Watch() as watch:
        loss = roma.roma_loss(
            hidden,
            views,
            weight,
            tokens,
            mask=mask,
            advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
            correct=torch.tensor([True, False, True, False]),
            old_logp=torch.full((b, t), -9.0),
            aux_view=torch.tensor([0, 1, 2, 3]),
            config=roma.RomaConfig(worst_over=worst_over),
            workspace=workspace,
            backend=kernel,
        ).loss
        loss.backward()
    rows = (k + 1) * b * t
    states = rows * d
    # The torch back end casts to fp32 what it multiplies: three tiles of logits, and one of W.
    # The native one casts tiles of W where the CPU does not multiply bf16.
    least = {"torch": 3 * 2**20 * 16 // 2 + 2048 * d * 8, "native": 0, "triton": 0}[kernel]
    if kernel == "native" and native_backend.product_dtype(hidden, weight) != dtype:
        least = 2048 * d * 4
    if kernel == "triton" and worst_over == "token" and dtype != torch.float32:
        # On a CPU, whose products do not widen, the token-local path casts W and dz in the chunks.
        least = 4 * v * d + workspace
    inputs = (states + v * d) * dtype.itemsize
    gradients = (states + v * d) * 4
    partial_sums = 2 * 4 * rows * (v // 512 + 1)
    vectors = 32 * 8 * rows  # log-probs, sums, indices: less than 32 numbers a row
    assert watch.largest < rows * v / 4
    assert watch.peak <= inputs + gradients + workspace + partial_sums + vectors + least
