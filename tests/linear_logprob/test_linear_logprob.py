"""linear_logprob against the oracle: values and every gradient; and the comparator bites."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

import roma
from roma.testing import compare_head, strategies, tolerance
from roma.testing.strategies import HeadSpec, head_specs


@given(spec=head_specs())
@example(spec=HeadSpec(v=1, difficulty="peaked_tail", bias=True, entropy=True))
@example(spec=HeadSpec(v=127, difficulty="below_zero", dtype=torch.bfloat16))
@example(
    spec=HeadSpec(v=129, difficulty="peaked_tail", softcap=30.0, temperature="rows", entropy=True)
)
@example(  # the target's p underflows, and its slope through the softcap must still be 0
    spec=HeadSpec(v=127, difficulty="huge_logits", softcap=30.0, temperature="rows")
)
def test_values_and_gradients(spec: HeadSpec, backend: str) -> None:
    """All outputs and gradients under random upstreams, over every option and difficulty."""
    compare_head.check_against_oracle(spec, backend)


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec(difficulty="plain", entropy=True, bias=True, softcap=5.0, temperature="rows"),
        HeadSpec(difficulty="plain", dtype=torch.bfloat16, entropy=True),
        HeadSpec(difficulty="plain", dtype=torch.float16),
        HeadSpec(difficulty="below_zero"),
        HeadSpec(difficulty="peaked_tail", dtype=torch.bfloat16),
        HeadSpec(difficulty="huge_logits", entropy=True),
    ],
    ids=lambda s: f"{s.difficulty}-{s.dtype}",
)
def test_many_blocks(spec: HeadSpec, backend: str) -> None:
    """More rows and a longer vocabulary than any block, neither a multiple of one.

    Maxima and sums are carried over.
    """
    compare_head.check_against_oracle(replace(spec, shape=(1100,), d=5, v=2603), backend)


@given(spec=head_specs(dtype=torch.float32, bias=True))
@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "bias")]
)
def test_frozen_parts(frozen: tuple[str, ...], spec: HeadSpec, backend: str) -> None:
    """A frozen argument gets no gradient, and the others' do not change."""
    compare_head.check_against_oracle(spec, backend, frozen=frozen)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_mixed_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, backend: str) -> None:
    """Each gradient has its own leaf's dtype."""
    spec = HeadSpec(
        shape=(17,), v=129, dtype=dtype, weight_dtype=weight_dtype, bias=True, entropy=True
    )
    inputs = spec.make()
    try:
        compare_head.call(inputs, spec, backend)
    except (TypeError, ValueError) as refusal:
        assert "weight: expected" in str(refusal)  # refusing is allowed, silently rounding is not
        return
    compare_head.check_against_oracle(spec, backend)


@given(spec=head_specs(dtype=torch.float64))
def test_float64_reference(spec: HeadSpec) -> None:
    """In float64 the reference is the oracle to float64's rounding."""
    compare_head.check_against_oracle(spec, "reference")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", ["float", "rows"])
def test_gradcheck_reference(softcap: float | None, temperature: str) -> None:
    """Finite differences in float64 agree with the reference's gradient of logp and entropy."""
    spec = HeadSpec(
        shape=(3,),
        d=4,
        v=7,
        dtype=torch.float64,
        bias=True,
        softcap=softcap,
        temperature=temperature,
    )
    inputs = spec.make()

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out = roma.linear_logprob(
            hidden,
            weight,
            inputs["tokens"],
            bias=bias,
            temperature=inputs["temperature"],
            softcap=softcap,
            entropy=True,
            backend="reference",
        )
        return out.logp, out.entropy

    leaves = tuple(inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    assert torch.autograd.gradcheck(outputs, leaves)


def test_defaults_and_types(backend: str) -> None:
    """Entropy is None unless asked for; outputs are float32 always; lse is a constant."""
    spec = HeadSpec(dtype=torch.bfloat16, entropy=True)
    inputs = spec.make()
    plain = roma.linear_logprob(
        inputs["hidden"], inputs["weight"], inputs["tokens"], backend=backend
    )
    assert plain.entropy is None
    assert not plain.logp.requires_grad
    got, _ = compare_head.call(inputs, spec, backend)
    assert {x.dtype for x in (got.logp, got.lse, got.entropy)} == {torch.float32}
    assert got.logp.requires_grad and got.entropy.requires_grad
    # Section 1 has no upstream for lse: it must not look differentiable and then drop its gradient.
    assert not got.lse.requires_grad
    auto = roma.linear_logprob(inputs["hidden"], inputs["weight"], inputs["tokens"])
    assert auto.logp.shape == spec.shape


def test_vocabulary_of_one(backend: str) -> None:
    """V = 1: certain, so logp and entropy are exactly 0 and nothing moves."""
    spec = HeadSpec(v=1, bias=True, entropy=True)
    got, leaves = compare_head.call(spec.make(), spec, backend)
    assert torch.equal(got.logp, torch.zeros(5)) and torch.equal(got.entropy, torch.zeros(5))
    (got.logp.sum() + got.entropy.sum()).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@given(spec=head_specs(difficulty="peaked_tail"))
def test_logp_is_never_positive(spec: HeadSpec, backend: str) -> None:
    """Target logit and lse come from one accumulator, so z_y ≤ lse holds exactly."""
    got, _ = compare_head.call(spec.make(), spec, backend)
    assert bool((got.logp <= 0).all())
    if spec.entropy:
        slack = tolerance.few(1 + got.lse.abs())
        assert bool((got.entropy >= -slack).all()) and bool(
            (got.entropy <= math.log(spec.v) + slack).all()
        )


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_planted_errors_are_refused(dtype: torch.dtype) -> None:
    """Ten bounds on one element, or ten mean bounds on all, must fail.

    A bound is a small share of the signal.
    """
    spec = HeadSpec(shape=(17,), d=33, v=257, dtype=dtype, entropy=True)
    inputs, upstream = spec.make(), compare_head.draw_upstream(spec)
    want, want_grad = compare_head.run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = compare_head.run_oracle(inputs, upstream, torch.float32)
    noise = tolerance.logp_noise(want, inputs["hidden"], inputs["weight"], 1.0, dtype)
    dz = tolerance.dlogits(
        want, inputs["tokens"], upstream["logp"], upstream["entropy"], 0.0, noise, scale=1.0,
        softcap=None, dtype=dtype
    )  # fmt: skip
    cases = {
        "logp": (want.logp, eager.logp, torch.float32, noise),
        "entropy": (want.entropy, eager.entropy, torch.float32, noise),
        "dhidden": (
            want_grad["hidden"],
            eager_grad["hidden"],
            dtype,
            tolerance.dhidden_noise(dz, inputs["weight"], dtype),
        ),
        "dweight": (
            want_grad["weight"],
            eager_grad["weight"],
            dtype,
            tolerance.dweight_noise(dz, inputs["hidden"], dtype),
        ),
    }
    for name, (value, plain, out_dtype, spread) in cases.items():
        limit = tolerance.bound(value, plain, out_dtype, spread)
        share = tolerance.SHARE[out_dtype]
        assert limit.largest <= share * float(value.detach().abs().max()), (
            f"{name}: the bound is too loose to prove anything"
        )
        how = {"dtype": torch.float64, "noise": spread}
        wide = tolerance.bound(value, plain, torch.float64, spread)
        assert not tolerance.refuses(name, value.detach(), value, plain, **how)
        one = value.detach().clone()
        one.view(-1)[one.numel() // 2] += tolerance.PLANTED * wide.largest
        assert tolerance.refuses(name, one, value, plain, **how)
        everywhere = value.detach() + tolerance.PLANTED * wide.mean
        assert tolerance.refuses(name, everywhere, value, plain, **how)
        broken = value.detach().clone()
        broken.view(-1)[0] = float("nan")
        assert tolerance.refuses(name, broken, value, plain, **how)
        assert tolerance.refuses(name, value.detach().float(), value, plain, **how)  # another dtype
        assert tolerance.refuses(name, value.detach()[:-1], value, plain, **how)  # another shape
