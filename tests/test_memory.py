"""What one loss of realistic size takes, on the torch back end."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_peak_memory_of_one_loss() -> None:
    """K = 4, 512 tokens, V = 151,936, D = 512, bf16: ≤ 400 MiB beyond one fp32 dW (297 MiB)."""
    program = [sys.executable, str(HERE / "peak_memory.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=HERE.parent)
    fp32_dweight = 151_936 * 512 * 4 / 2**20
    assert float(done.stdout) <= 400 + fp32_dweight
