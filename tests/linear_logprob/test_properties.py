"""linear_logprob: what must hold without knowing the right numbers (STYLE, rule 14)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from torch import Tensor

from roma.testing import compare_head, tolerance
from roma.testing.strategies import HeadSpec, head_specs


@given(spec=head_specs())
def test_same_input_twice_is_bitwise_equal(spec: HeadSpec, backend: str) -> None:
    """Two runs agree to the last bit, gradients included."""
    inputs, runs = spec.make(), []
    for _ in range(2):
        got, leaves = compare_head.call(inputs, spec, backend)
        compare_head.backward(got, compare_head.draw_upstream(spec))
        runs.append([got.logp, got.lse, *(leaf.grad for leaf in leaves.values())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@given(spec=head_specs(dtype=torch.float32, bias=True, softcap=None, difficulty="plain"))
def test_shifting_logits_changes_nothing(spec: HeadSpec, backend: str) -> None:
    """A constant on every logit moves lse by that constant over τ, and neither logp nor entropy."""
    inputs = spec.make()
    before, _ = compare_head.call(inputs, spec, backend)
    # A multiple of 1/8 near 64: the shifted bias is rounded once, at 2^-18.
    after, _ = compare_head.call(inputs | {"bias": inputs["bias"] + 64.0}, spec, backend)
    rounding = tolerance.few(64.0) / 0.5
    scale = compare_head.row_scale(inputs)
    shift = 64.0 * (scale.reshape(spec.shape) if isinstance(scale, Tensor) else scale)
    for got, want in ((after.logp, before.logp), (after.lse, before.lse.double() + shift)):
        assert bool(((got.double() - want.double()).abs() <= rounding).all())
    if spec.entropy:
        assert bool(
            ((after.entropy - before.entropy).abs() <= rounding * math.log(spec.v + 1)).all()
        )


@given(spec=head_specs(dtype=torch.float32, bias=True, softcap=None, shape=(1,)))
def test_logit_gradient_sums_to_zero(spec: HeadSpec, backend: str) -> None:
    """Softmax is blind to a shift, so the row sum of dz is 0.

    With one row, that is the sum of db.
    """
    inputs = spec.make()
    got, leaves = compare_head.call(inputs, spec, backend)
    upstream = compare_head.draw_upstream(replace(spec, seed=3))
    compare_head.backward(got, upstream)
    db = leaves["bias"].grad.double()
    noise = tolerance.logp_noise(
        compare_head.run_oracle(inputs, upstream, torch.float64)[0],
        inputs["hidden"],
        inputs["weight"],
        compare_head.row_scale(inputs),
        spec.dtype,
    )
    size = sum(float(x.abs().sum()) for x in upstream.values()) * (1 + math.log(spec.v)) / 0.5
    assert (
        abs(float(db.sum())) <= (tolerance.SIGMAS * float(noise.max()) + tolerance.few(1.0)) * size
    )


@given(spec=head_specs(shape=(17,)))
def test_rows_are_independent(spec: HeadSpec, backend: str) -> None:
    """Permuting rows permutes outputs and dh.

    Dropping rows without upstream changes neither dh nor dW.
    """
    inputs = spec.make()
    upstream = compare_head.draw_upstream(spec)
    got, leaves = compare_head.call(inputs, spec, backend)
    compare_head.backward(got, upstream)
    keep = (upstream["logp"] != 0).nonzero()[:, 0].flip(0)
    fewer = inputs | {"hidden": inputs["hidden"][keep], "tokens": inputs["tokens"][keep]}
    if isinstance(inputs["temperature"], Tensor):
        fewer["temperature"] = inputs["temperature"][keep]
    part, part_leaves = compare_head.call(fewer, spec, backend)
    compare_head.backward(part, {n: g[keep] for n, g in upstream.items()})
    want, want_grad = compare_head.run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = compare_head.run_oracle(inputs, upstream, torch.float32)
    noise = tolerance.logp_noise(
        want, inputs["hidden"], inputs["weight"], compare_head.row_scale(inputs), spec.dtype
    )
    tolerance.check(
        "logp", part.logp, want.logp[keep], eager.logp[keep], dtype=torch.float32, noise=noise
    )
    inactive = torch.ones(17, dtype=torch.bool)
    inactive[keep] = False
    assert bool(
        (leaves["hidden"].grad[inactive] == 0).all()
    )  # exactly: these rows are not computed at all
    dz = tolerance.dlogits(
        want,
        inputs["tokens"],
        upstream["logp"],
        upstream.get("entropy", 0.0),
        0.0,
        noise,
        scale=compare_head.row_scale(inputs),
        softcap=spec.softcap,
        dtype=spec.dtype,
    )
    spreads = {
        "hidden": tolerance.dhidden_noise(dz, inputs["weight"], spec.dtype),
        "weight": tolerance.dweight_noise(dz, inputs["hidden"], spec.dtype),
    }
    for name, spread in spreads.items():
        index = keep if name == "hidden" else slice(None)
        whole, half = leaves[name].grad[index].double(), part_leaves[name].grad.double()
        # Both lie within the bound of the same oracle, so within two of each other.
        limit = tolerance.bound(want_grad[name], eager_grad[name], spec.dtype, spread)
        assert whole.numel() == 0 or float((whole - half).abs().amax()) <= 2 * limit.largest
