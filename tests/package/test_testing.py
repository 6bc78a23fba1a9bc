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


LOSSES = ["roma_loss", "roma_loss_from_logp"]


def highest_of_a_tie(out: Any) -> Any:
    """The same choice of views, but of equal ones the highest index."""
    scored = out.view_logp.detach().reshape(len(out.view_logp), *out.worst_view.shape[:1], -1)
    chosen = out.worst_view.clone()
    for row, worst in enumerate(chosen.tolist() if chosen.ndim == 1 else []):
        own = scored[:, row]
        chosen[row] = max(k for k in range(len(own)) if torch.equal(own[k], own[worst]))
    return out._replace(worst_view=chosen)


@pytest.mark.parametrize("op", LOSSES)
def test_a_tie_broken_the_other_way_is_refused(op: Any) -> None:
    """A sequence's worst view where two are equal; also with so few examples that none is drawn."""
    with pytest.raises(AssertionError, match="of equal views the lowest index"):
        check_backend(spoiled(highest_of_a_tie), op=op, examples=1, packed=False)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("name", sorted(roma.METRICS))
@pytest.mark.parametrize("op", LOSSES)
def test_every_metric_is_held_to_the_oracle(op: Any, name: str) -> None:
    def wrong(out: Any) -> Any:
        return out._replace(metrics=out.metrics | {name: -1.5 * out.metrics[name] + 7})

    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_backend(spoiled(wrong), op=op, examples=20)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("name", [n for n in sorted(roma.METRICS) if n != "loss"])
def test_a_metric_slightly_off_is_refused(name: str) -> None:
    """One part in a hundred, which no rounding makes."""

    def wrong(out: Any) -> Any:
        return out._replace(metrics=out.metrics | {name: out.metrics[name] * 1.01})

    with pytest.raises(AssertionError, match=rf"^{name}: "):
        check_backend(spoiled(wrong), op="roma_loss_from_logp", examples=100)


def over_wrong_ones_too(*tensors: Any, config: roma.RomaConfig, **named: Any) -> Any:
    """The mean divergence of all rollouts, right or wrong; all else is as it should be."""
    out = spoiled(same)(*tensors, config=config, **named)
    every = named | {"correct": torch.ones_like(named["correct"]), "total_correct": None}
    others = spoiled(same, penalty_over="all")(*tensors, config=config, **every).metrics
    mean = {"roma_penalty_mean": others["roma_penalty_mean"]}
    return out._replace(metrics=out.metrics | mean)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("op", LOSSES)
def test_a_mean_over_wrong_rollouts_is_refused(op: Any) -> None:
    with pytest.raises(AssertionError, match=r"^roma_penalty_mean: "):
        check_backend(over_wrong_ones_too, op=op, examples=20)


@pytest.mark.parametrize("op", ["linear_logprob", *LOSSES])
def test_another_result_is_refused(op: Any) -> None:
    for result in (None, (1, 2), torch.ones(3)):
        with pytest.raises(
            AssertionError, match=rf"^{op}: expected a (TokenLogprobs|RomaLoss), got"
        ):
            check_backend(lambda *_, result=result, **__: result, op=op, examples=1)
    with pytest.raises(ValueError, match=r"^candidate: expected a function, got 'torch'"):
        check_backend("torch", op=op)  # type: ignore[arg-type]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^op: expected one of 'linear_logprob'.*got 'typo'; "):
        check_backend(same, op="typo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^HeadSpec\.temperature: expected one of 'one'"):
        check_backend(same, temperature=1.0)
    with pytest.raises(ValueError, match=r"^batch: expected a field of LossSpec, got an unknown"):
        check_backend(same, op="roma_loss", batch=3)


@pytest.mark.parametrize("op", LOSSES)
def test_options_can_be_pinned(op: Any) -> None:
    config = roma.RomaConfig(worst_over="token")
    check_backend(spoiled(same), op=op, examples=5, config=config, k=2)
    with pytest.raises(ValueError, match=r"^LossSpec\.totals: expected one of 'own'"):
        check_backend(same, op=op, totals="typo")


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("op", LOSSES)
def test_log_probs_without_a_gradient_are_refused(op: Any) -> None:
    """What another objective with main=None stands on."""

    def detached(out: Any) -> Any:
        return out._replace(logp=out.logp.detach(), view_logp=out.view_logp.detach())

    with pytest.raises(AssertionError, match=r"got no gradient|^d"):
        check_backend(spoiled(detached), op=op, examples=30)


@pytest.mark.parametrize("op", LOSSES)
def test_a_right_loss_passes(op: Any) -> None:
    check_backend(spoiled(same), op=op, examples=20)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("op", LOSSES)
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
