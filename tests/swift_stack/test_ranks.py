"""Two gloo ranks take the step that one rank takes with twice the micro-batches."""

from pathlib import Path

import pytest
import torch
from swift_stack.launch import run as launch

from roma.testing import tolerance


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_two_ranks_are_one(model, rows, tmp_path, kind):
    script = Path(__file__).with_name("two_ranks.py")
    saved = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        steps = 4 // ranks
        made = launch(*launcher, script, model, rows, tmp_path / f"out{ranks}", out, steps, kind)
        assert made.returncode == 0, made.stderr[-3000:]
        saved[ranks] = torch.load(out, weights_only=False)
    one, two = saved[1], saved[2]
    # The same completions, dealt in the same micro-batches; their numbers of pairs differ.
    assert one["texts"][:4] == two["texts"]
    assert len(set(one["pairs"])) > 1
    assert one["grads"].keys() == two["grads"].keys()
    for name, want in one["grads"].items():
        # Four micro-batches' gradients, added in another order: few roundings of their sizes.
        bound = tolerance.few(one["sizes"][name]) + torch.finfo(torch.float32).tiny
        assert ((two["grads"][name] - want).abs() <= bound).all(), name
    assert any((grad.abs() > 1e3 * tolerance.few(1.0)).any() for grad in one["grads"].values())
    assert one["logs"].keys() == two["logs"].keys()
    for name, want in one["logs"].items():
        assert two["logs"][name] == pytest.approx(want, rel=tolerance.few(1.0)), name
