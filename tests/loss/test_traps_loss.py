"""The ten traps of losses over a large vocabulary, each of which has bitten a known project.

5 to 7, in the loss and its gradient.

Every test holds the back end to the rule and then shows that it would have noticed: the faulty form
stands in the test, small and in plain PyTorch, and the same comparison must refuse it.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.counting import Watch

import roma
from roma import RomaConfig
from roma.testing import (
    compare_head,
    compare_logp,
    compare_whole,
    oracle,
    tensors,
    tolerance,
)
from roma.testing.strategies import HeadSpec, LossSpec


def test_5_upstream_per_token(backend: str) -> None:
    """Every token's upstream counts on its own; the faulty form knows their mean only."""
    spec = HeadSpec(shape=(17,), v=33)
    inputs = spec.make()
    upstream = {"logp": torch.randn(17, generator=tensors.generator(3))}
    mean = {"logp": upstream["logp"].mean().expand(17)}
    want, want_grad = compare_head.run_oracle(inputs, upstream, torch.float64)
    _, eager_grad = compare_head.run_oracle(inputs, upstream, torch.float32)
    _, faulty = compare_head.run_oracle(inputs, mean, torch.float32)
    out, leaves = compare_head.call(inputs, spec, backend)
    out.logp.backward(upstream["logp"])
    spread = (
        8
        * float(compare_head.row_noise(inputs, want).detach().max())
        * float(want_grad["weight"].abs().max())
    )
    for name in ("hidden", "weight"):
        how = {"dtype": torch.float32, "noise": spread}
        tolerance.check(name, leaves[name].grad, want_grad[name], eager_grad[name], **how)
        assert tolerance.refuses(name, faulty[name], want_grad[name], eager_grad[name], **how)


def test_5_gradient_scaling_is_exact(backend: str) -> None:
    """A loss scale of 2^16 scales every gradient bit for bit (float32.

    No part of it was formed without the upstream).
    """
    grads = []
    for factor in (1.0, 2.0**16):
        case = compare_whole.on_leaves(LossSpec(bias=True).make())
        (factor * compare_whole.call(case, backend).loss).backward()
        grads.append([case[n].grad for n in compare_whole.LEAVES])
    for plain, scaled in zip(*grads, strict=True):
        assert bool(plain.any())
        assert torch.equal(plain * 2.0**16, scaled)


def test_5_accumulation_and_retain_graph(backend: str) -> None:
    """A second backward over a retained graph adds the same again; so does a second micro-batch."""
    case = compare_whole.on_leaves(LossSpec(bias=True).make())
    loss = compare_whole.call(case, backend).loss
    loss.backward(retain_graph=True)
    once = {n: case[n].grad.clone() for n in compare_whole.LEAVES}
    loss.backward()
    twice = {n: case[n].grad.clone() for n in compare_whole.LEAVES}
    compare_whole.call(case, backend).loss.backward()
    for name, grad in once.items():
        assert torch.equal(twice[name], 2 * grad), name
        slack = tolerance.few(float(grad.abs().max()))
        assert bool(((case[name].grad - 3 * grad).abs() <= slack).all()), name


def test_5_backward_twice_without_retaining_fails(backend: str) -> None:
    """Freed buffers are an error as everywhere in PyTorch, never a wrong number."""
    case = compare_whole.on_leaves(LossSpec().make())
    loss = compare_whole.call(case, backend).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_5_second_derivatives_are_right_or_refused(backend: str) -> None:
    """Nobody gets a silent zero for a gradient penalty."""
    spec = HeadSpec(shape=(5,), dtype=torch.float32)
    inputs = spec.make()
    out, leaves = compare_head.call(inputs, spec, backend)
    target = leaves["hidden"]
    (first,) = torch.autograd.grad(out.logp.sum(), target, create_graph=True)
    refused = False
    try:
        (second,) = torch.autograd.grad((first**2).sum(), target)
    except RuntimeError:
        refused = True
    if not refused:
        leaf = inputs["hidden"].double().requires_grad_()
        exact = oracle.head(**(inputs | {"hidden": leaf}))
        (rate,) = torch.autograd.grad(exact.logp.sum(), leaf, create_graph=True)
        (want,) = torch.autograd.grad((rate**2).sum(), leaf)
        assert float((second - want).abs().max()) <= tolerance.many(8.0) * float(want.abs().max())


def penalty(delta: float, backend: str, dtype: torch.dtype = torch.float32) -> float:
    """The penalty of one token whose view is off by delta, through the public function."""
    clean = torch.tensor([[0.0]], dtype=dtype)
    return float(
        roma.roma_loss_from_logp(
            clean,
            torch.tensor([[[delta]]], dtype=dtype),
            mask=torch.tensor([[True]]),
            advantages=torch.tensor([0.0]),
            correct=torch.tensor([True]),
            old_logp=clean,
            config=RomaConfig(main=None),
            backend=backend,
        ).loss
    )


@pytest.mark.parametrize("delta", [2.0**-7, 2.0**-10, -(2.0**-10), 2.0**-12])
def test_6_small_differences_do_not_cancel(delta: float, backend: str) -> None:
    """expm1(δ) - δ keeps the digits that exp(δ) - δ - 1 loses altogether."""
    want = math.expm1(delta) - delta
    # expm1 is off by eps·|δ|, against a value of δ²/2: a relative error of 2·eps/|δ|.
    slack = 2 * tolerance.eps(torch.float32) * abs(delta)
    assert abs(penalty(delta, backend) - want) <= slack
    x = torch.tensor(delta)
    faulty = float(torch.exp(x) - x - 1)
    if abs(delta) <= 2.0**-12:
        assert abs(faulty - want) > 0.05 * want  # the fault is visible,
    assert slack <= 0.02 * want or abs(faulty - want) > slack  # and this bound would have seen it


def test_6_zero_difference_is_exactly_zero(backend: str) -> None:
    """δ = 0: no penalty and no gradient, exactly."""
    spec = LossSpec(difficulty="views_equal_clean", aux=False, config=RomaConfig(main=None))
    case = compare_logp.on_leaves(spec.make_logp())
    got = compare_logp.call(case, backend)
    got.loss.backward()
    assert float(got.loss.detach()) == 0.0 and not bool(case["view_logp"].grad.any())


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_6_masked_junk_never_reaches_the_exponential(junk: float, backend: str) -> None:
    """Masked means selected away before exp; multiplying by 0 afterwards gives inf·0 = NaN."""
    case = LossSpec(b=3, t=7, config=RomaConfig(ref_coef=0.1, aux_old="view")).make_logp()
    masked = ~case["mask"]
    assert bool(masked.any())
    dirty = dict(case)
    for name in ("logp", "view_logp", "old_logp", "ref_logp", "view_old_logp"):
        dirty[name] = case[name].masked_fill(masked, junk)
    clean, dirty = compare_logp.on_leaves(case), compare_logp.on_leaves(dirty)
    a, b = compare_logp.call(clean, backend), compare_logp.call(dirty, backend)
    assert torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for name in compare_logp.LOGPS:
        assert torch.equal(clean[name].grad, dirty[name].grad)
    for key, value in a.metrics.items():
        assert torch.equal(value, b.metrics[key]), key

    # The fault, forward and backward: mask after the exponential.
    delta = torch.tensor([0.1, junk], requires_grad=True)
    faulty = ((torch.expm1(delta) - delta) * torch.tensor([1.0, 0.0])).sum()
    faulty.backward()
    assert not (bool(torch.isfinite(faulty)) and bool(torch.isfinite(delta.grad).all()))


def test_6_ties_are_not_shared(backend: str) -> None:
    """One rule: the lowest index takes the whole gradient.

    Amax, the faulty form, splits it evenly.
    """
    spec = LossSpec(k=3, difficulty="views_identical", aux=False, config=RomaConfig(main=None))
    case = compare_logp.on_leaves(spec.make_logp() | {"correct": torch.ones(3, dtype=torch.bool)})
    got = compare_logp.call(case, backend)
    got.loss.backward()
    assert bool(case["view_logp"].grad[0].any()) and not bool(case["view_logp"].grad[1:].any())
    views = case["view_logp"].detach().requires_grad_()
    delta = (views - case["logp"].detach()).masked_fill(~case["mask"], 0.0)
    by_view = (torch.expm1(delta) - delta).sum(dim=2) / case["mask"].sum(dim=1)
    by_view.amax(dim=0).mean().backward()
    assert bool(views.grad[1:].any())


def test_7_no_float64_in_a_float32_call(kernel: str) -> None:
    """Temperature, softcap, λ, clips and counts are Python floats.

    No tensor may turn double because of them.
    """
    config = RomaConfig(temperature=0.7, softcap=5.0, ref_coef=0.1, aux_old="view")
    case = compare_whole.on_leaves(LossSpec(bias=True, totals="number", config=config).make())
    with Watch() as watch:
        compare_whole.call(case, kernel).loss.backward()
    assert not watch.float64
    with Watch() as faulty:
        torch.randn(3) * torch.tensor([0.7], dtype=torch.float64)  # the fault
    assert faulty.float64


def test_7_results_are_float32_whatever_the_arguments(backend: str) -> None:
    """Double-precision constants do not promote the loss of a float32 model."""
    case = LossSpec(totals="tensor").make()
    for name in ("old_logp", "advantages", "total_sequences", "total_tokens", "total_correct"):
        case[name] = case[name].double()
    got = compare_whole.call(case, backend)
    assert {got.loss.dtype, got.logp.dtype, got.view_logp.dtype} == {torch.float32}
    assert {value.dtype for value in got.metrics.values()} == {torch.float32}
