"""roma.testing: what it lets pass, what it refuses, and what it says then."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import roma
from roma.testing import candidate, check_backend, compare_head, compare_whole
from roma.testing.strategies import HeadSpec, LossSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_kernel.py"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel of one's own passes; the same with its tail forgotten does not."""
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "within the bounds on 200 inputs" in said
    assert "with_the_bug:" in said and "exceeds" in said
    assert "HeadSpec(" in said  # the input, as a line that makes it again


def spoiled(change: Callable[[Any], Any], **options: Any) -> Callable[..., Any]:
    """roma_loss with one thing wrong in its result or in its options."""

    def loss(*tensors: Any, config: roma.RomaConfig, **named: Any) -> Any:
        function = roma.roma_loss if len(tensors) == 4 else roma.roma_loss_from_logp
        config = replace(config, **options)
        return change(function(*tensors, config=config, backend="torch", **named))

    return loss


def same(out: Any) -> Any:
    return out


@pytest.mark.parametrize("op", ["roma_loss", "roma_loss_from_logp"])
def test_a_right_loss_passes(op: Any) -> None:
    check_backend(spoiled(same), op=op, examples=20)


@pytest.mark.parametrize("op", ["roma_loss", "roma_loss_from_logp"])
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (spoiled(lambda out: out._replace(loss=out.loss * 1.001)), "exceeds"),
        (spoiled(lambda out: out._replace(worst_view=out.worst_view * 0)), "worst_view"),
        (spoiled(lambda out: out._replace(logp=out.logp.bfloat16().float())), "logp"),
        (spoiled(lambda out: out._replace(loss=out.loss.detach() + 0 * out.loss)), "d[a-z_]+: "),
        (spoiled(same, penalty_ratio="clean/view"), "exceeds|worst_view"),
        (spoiled(same, clip_high=0.2), "exceeds"),
    ],
    ids=["scaled", "first view", "rounded", "no gradient", "other direction", "other clip"],
)
def test_a_wrong_loss_is_refused(op: Any, wrong: Callable[..., Any], named: str) -> None:
    with pytest.raises(AssertionError, match=named) as found:
        check_backend(wrong, op=op, examples=200)
    assert "LossSpec(" in "\n".join(found.value.__notes__)


def test_on_another_device_the_same() -> None:
    """Values, gradients and strides survive the way there and back."""
    seen = []

    def watched(hidden: Any, *tensors: Any, **named: Any) -> Any:
        seen.append(hidden.stride())
        return roma.linear_logprob(hidden, *tensors, backend="torch", **named)

    spec = HeadSpec(bias=True, strided=True, temperature="rows")
    inputs = spec.make()
    compare_head.check_against_oracle(spec, candidate.on_device(watched, "cpu"))
    assert seen == [inputs["hidden"].stride()] != [inputs["hidden"].contiguous().stride()]
    loss = candidate.on_device(roma.roma_loss, "cpu")
    compare_whole.check_against_oracle(LossSpec(bias=True), loss)
    out = loss(**LossSpec().make())
    assert isinstance(out, roma.RomaLoss) and isinstance(out.metrics["loss"], torch.Tensor)
