"""linear_logprob against the oracle: values, every gradient, properties, and what a backward must not compute."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import strategies
import tolerance
import torch
from counting import Watch
from hypothesis import example, given
from strategies import HeadSpec, head_specs
from torch import Tensor

import roma


def run_oracle(inputs: dict, upstream: dict[str, Tensor], dtype: torch.dtype) -> tuple[oracle.Head, dict]:
    """The oracle on flattened rows; gradients of Σ upstream·output by hidden, weight and bias."""
    d = inputs["hidden"].shape[-1]
    leaves = {
        "hidden": inputs["hidden"].reshape(-1, d).to(dtype).requires_grad_(),
        "weight": inputs["weight"].to(dtype).requires_grad_(),
    }
    if inputs["bias"] is not None:
        leaves["bias"] = inputs["bias"].to(dtype).requires_grad_()
    temperature = inputs["temperature"]
    out = oracle.head(
        leaves["hidden"],
        leaves["weight"],
        inputs["tokens"].reshape(-1),
        bias=leaves.get("bias"),
        temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
        softcap=inputs["softcap"],
        dtype=dtype,
    )
    total = sum((g.reshape(-1).to(dtype) * getattr(out, name)).sum() for name, g in upstream.items())
    grads = torch.autograd.grad(total, list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


def draw_upstream(spec: HeadSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random gradients for logp and, if asked for, entropy; about a third of the rows get none."""
    g = strategies.generator(spec.seed + 1)
    active = torch.rand(spec.shape, generator=g) < 0.7
    names = ["logp", "entropy"] if spec.entropy else ["logp"]
    return {name: (torch.randn(spec.shape, generator=g) * active).to(dtype) for name in names}


def call(inputs: dict, spec: HeadSpec, backend: str, *, frozen: tuple[str, ...] = ()):
    """Call linear_logprob on fresh leaves; returns its output and the leaves."""
    leaves = {
        name: inputs[name].detach().requires_grad_(name not in frozen)
        for name in ("hidden", "weight", "bias")
        if inputs[name] is not None
    }
    out = roma.linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        inputs["tokens"],
        bias=leaves.get("bias"),
        temperature=inputs["temperature"],
        softcap=inputs["softcap"],
        entropy=spec.entropy,
        backend=backend,
    )
    return out, leaves


def backward(out, upstream: dict[str, Tensor], **how) -> None:
    torch.autograd.backward([getattr(out, n) for n in upstream], list(upstream.values()), **how)


def row_scale(inputs: dict) -> Tensor | float:
    t = inputs["temperature"]
    return 1 / t.reshape(-1).double() if isinstance(t, Tensor) else 1 / t


def check_against_oracle(spec: HeadSpec, backend: str, frozen: tuple[str, ...] = ()) -> None:
    """Values and gradients of one call, each with got, want, eager and derived noise."""
    inputs = spec.make()
    accumulate = tolerance.accumulator(spec.dtype)
    upstream = draw_upstream(spec, accumulate)
    want, want_grad = run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = run_oracle(inputs, upstream, accumulate)
    got, leaves = call(inputs, spec, backend, frozen=frozen)

    flat = inputs["hidden"].reshape(-1, spec.d)
    scale = row_scale(inputs)
    noise = tolerance.logp_noise(want, flat, inputs["weight"], scale, spec.dtype)
    for name in ("logp", "lse", "entropy"):
        value = getattr(got, name)
        if name == "entropy" and not spec.entropy:
            assert value is None
            continue
        assert value.shape == inputs["hidden"].shape[:-1]
        tolerance.check(
            name,
            value.reshape(-1),
            getattr(want, name),
            getattr(eager, name),
            dtype=accumulate,
            noise=noise,
        )

    backward(got, upstream)
    draw, draw_noise = tolerance.dlogit_noise(
        want,
        inputs["tokens"].reshape(-1),
        upstream["logp"].reshape(-1),
        upstream["entropy"].reshape(-1) if spec.entropy else 0.0,
        0.0,
        noise,
        scale=scale,
        softcap=spec.softcap,
        dtype=spec.dtype,
    )
    noises = {
        "hidden": tolerance.product_noise(draw_noise, draw, inputs["weight"], spec.dtype),
        "weight": tolerance.product_noise(draw_noise.T, draw.T, flat, spec.dtype),
        "bias": tolerance.product_noise(draw_noise.T, draw.T, torch.ones(len(flat), 1), spec.dtype)[:, 0],
    }
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None, f"{name} is frozen"
            continue
        assert leaf.grad is not None, f"{name} got no gradient"
        tolerance.check(
            f"d{name}",
            leaf.grad.reshape(want_grad[name].shape),
            want_grad[name],
            eager_grad[name],
            dtype=leaf.dtype,
            noise=noises[name],
        )


@given(spec=head_specs())
@example(spec=HeadSpec(v=1, difficulty="peaked_tail", bias=True, entropy=True))
@example(spec=HeadSpec(v=127, difficulty="below_zero", dtype=torch.bfloat16))
@example(spec=HeadSpec(v=129, difficulty="peaked_tail", softcap=30.0, temperature="rows", entropy=True))
def test_values_and_gradients(spec: HeadSpec, backend: str) -> None:
    """Logp, lse, entropy, dh, dW and db with random upstream gradients, over every option and difficulty."""
    check_against_oracle(spec, backend)


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
    """More rows and a longer vocabulary than any block, neither a multiple of one: maxima and sums are carried over."""
    check_against_oracle(replace(spec, shape=(1100,), d=5, v=2603), backend)


@given(spec=head_specs(dtype=torch.float32, bias=True))
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
def test_frozen_parts(frozen: tuple[str, ...], spec: HeadSpec, backend: str) -> None:
    """A frozen argument gets no gradient, and the others' do not change."""
    check_against_oracle(spec, backend, frozen=frozen)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_mixed_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, backend: str) -> None:
    """Each gradient has its own leaf's dtype."""
    spec = HeadSpec(shape=(17,), v=129, dtype=dtype, weight_dtype=weight_dtype, bias=True, entropy=True)
    inputs = spec.make()
    try:
        call(inputs, spec, backend)
    except (TypeError, ValueError) as refusal:
        assert "weight: expected" in str(refusal)  # refusing is allowed, silently rounding is not
        return
    check_against_oracle(spec, backend)


@given(spec=head_specs(dtype=torch.float64))
def test_float64_reference(spec: HeadSpec) -> None:
    """In float64 the reference is the oracle to float64's rounding."""
    check_against_oracle(spec, "reference")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", ["float", "rows"])
def test_gradcheck_reference(softcap: float | None, temperature: str) -> None:
    """Finite differences in float64 agree with the reference's gradient of logp and entropy."""
    spec = HeadSpec(
        shape=(3,), d=4, v=7, dtype=torch.float64, bias=True, softcap=softcap, temperature=temperature
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
    """Entropy is None unless asked for, whatever the dtype the three outputs are float32, lse carries no gradient."""
    spec = HeadSpec(dtype=torch.bfloat16, entropy=True)
    inputs = spec.make()
    plain = roma.linear_logprob(inputs["hidden"], inputs["weight"], inputs["tokens"], backend=backend)
    assert plain.entropy is None
    assert not plain.logp.requires_grad
    got, _ = call(inputs, spec, backend)
    assert {x.dtype for x in (got.logp, got.lse, got.entropy)} == {torch.float32}
    assert got.logp.requires_grad and got.entropy.requires_grad
    # Section 1 has no upstream for lse: it must not look differentiable and then drop its gradient.
    assert not got.lse.requires_grad
    auto = roma.linear_logprob(inputs["hidden"], inputs["weight"], inputs["tokens"])
    assert auto.logp.shape == spec.shape


def test_vocabulary_of_one(backend: str) -> None:
    """V = 1: certain, so logp and entropy are exactly 0 and nothing moves."""
    spec = HeadSpec(v=1, bias=True, entropy=True)
    got, leaves = call(spec.make(), spec, backend)
    assert torch.equal(got.logp, torch.zeros(5)) and torch.equal(got.entropy, torch.zeros(5))
    (got.logp.sum() + got.entropy.sum()).backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@given(spec=head_specs(difficulty="peaked_tail"))
def test_logp_is_never_positive(spec: HeadSpec, backend: str) -> None:
    """Target logit and lse come from one accumulator, so z_y ≤ lse holds exactly."""
    got, _ = call(spec.make(), spec, backend)
    assert bool((got.logp <= 0).all())
    if spec.entropy:
        slack = tolerance.SIGMAS * tolerance.eps(torch.float32) * (1 + got.lse.abs())
        assert bool((got.entropy >= -slack).all()) and bool((got.entropy <= math.log(spec.v) + slack).all())


# ---- properties -----------------------------------------------------------------------------------------------------


@given(spec=head_specs())
def test_same_input_twice_is_bitwise_equal(spec: HeadSpec, backend: str) -> None:
    """Two runs agree to the last bit, gradients included."""
    inputs, runs = spec.make(), []
    for _ in range(2):
        got, leaves = call(inputs, spec, backend)
        backward(got, draw_upstream(spec))
        runs.append([got.logp, got.lse, *(leaf.grad for leaf in leaves.values())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@given(spec=head_specs(dtype=torch.float32, bias=True, softcap=None, difficulty="plain"))
def test_shifting_logits_changes_nothing(spec: HeadSpec, backend: str) -> None:
    """A constant on every logit moves lse by itself over τ and leaves logp and entropy alone."""
    inputs = spec.make()
    before, _ = call(inputs, spec, backend)
    # A multiple of 1/8 near 64: the shifted bias is rounded once, at 2^-18.
    after, _ = call(inputs | {"bias": inputs["bias"] + 64.0}, spec, backend)
    rounding = 8 * tolerance.SIGMAS * tolerance.eps(torch.float32) * 64.0 / 0.5
    scale = row_scale(inputs)
    shift = 64.0 * (scale.reshape(spec.shape) if isinstance(scale, Tensor) else scale)
    for got, want in ((after.logp, before.logp), (after.lse, before.lse.double() + shift)):
        assert bool(((got.double() - want.double()).abs() <= rounding).all())
    if spec.entropy:
        assert bool(((after.entropy - before.entropy).abs() <= rounding * math.log(spec.v + 1)).all())


@given(spec=head_specs(dtype=torch.float32, bias=True, softcap=None, shape=(1,)))
def test_logit_gradient_sums_to_zero(spec: HeadSpec, backend: str) -> None:
    """Softmax is blind to a shift, so the row sum of dz is 0: with one row, that is the sum of db."""
    inputs = spec.make()
    got, leaves = call(inputs, spec, backend)
    upstream = draw_upstream(replace(spec, seed=3))
    backward(got, upstream)
    db = leaves["bias"].grad.double()
    noise = tolerance.logp_noise(
        run_oracle(inputs, upstream, torch.float64)[0],
        inputs["hidden"],
        inputs["weight"],
        row_scale(inputs),
        spec.dtype,
    )
    size = sum(float(x.abs().sum()) for x in upstream.values()) * (1 + math.log(spec.v)) / 0.5
    assert abs(float(db.sum())) <= tolerance.SIGMAS * float(noise.max()) * size + tolerance.eps(torch.float32) * size


@given(spec=head_specs(shape=(17,)))
def test_rows_are_independent(spec: HeadSpec, backend: str) -> None:
    """Permuting rows permutes outputs and dh; dropping rows without upstream changes neither dh nor dW."""
    inputs = spec.make()
    upstream = draw_upstream(spec)
    got, leaves = call(inputs, spec, backend)
    backward(got, upstream)
    keep = (upstream["logp"] != 0).nonzero()[:, 0].flip(0)
    fewer = inputs | {"hidden": inputs["hidden"][keep], "tokens": inputs["tokens"][keep]}
    if isinstance(inputs["temperature"], Tensor):
        fewer["temperature"] = inputs["temperature"][keep]
    part, part_leaves = call(fewer, spec, backend)
    backward(part, {n: g[keep] for n, g in upstream.items()})
    want, want_grad = run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = run_oracle(inputs, upstream, torch.float32)
    noise = tolerance.logp_noise(want, inputs["hidden"], inputs["weight"], row_scale(inputs), spec.dtype)
    tolerance.check("logp", part.logp, want.logp[keep], eager.logp[keep], dtype=torch.float32, noise=noise)
    inactive = torch.ones(17, dtype=torch.bool)
    inactive[keep] = False
    assert bool((leaves["hidden"].grad[inactive] == 0).all())  # exactly: these rows are not computed at all
    for name in ("hidden", "weight"):
        index = keep if name == "hidden" else slice(None)
        whole, half = leaves[name].grad[index].double(), part_leaves[name].grad.double()
        # Both lie within the bound of the same oracle, so within two of each other.
        draw, draw_noise = tolerance.dlogit_noise(
            want,
            inputs["tokens"],
            upstream["logp"],
            upstream.get("entropy", 0.0),
            0.0,
            noise,
            scale=row_scale(inputs),
            softcap=spec.softcap,
            dtype=spec.dtype,
        )
        sides = (draw_noise, draw, inputs["weight"]) if name == "hidden" else (
            draw_noise.T, draw.T, inputs["hidden"])  # fmt: skip
        limit = tolerance.bound(
            want_grad[name], eager_grad[name], spec.dtype, tolerance.product_noise(*sides, spec.dtype)
        )
        assert float((whole - half).abs().amax()) <= 2 * limit.largest


def test_non_finite_rows_without_upstream_do_not_leak(kernel: str) -> None:
    """A row whose upstream is 0 contributes nothing, even if its hidden state overflowed."""
    spec = HeadSpec(shape=(5,), v=33)
    inputs = spec.make()
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5])
    poisoned = inputs["hidden"].clone()
    poisoned[1], poisoned[3] = float("inf"), float("nan")
    got, leaves = call(inputs | {"hidden": poisoned}, spec, kernel)
    clean, clean_leaves = call(inputs, spec, kernel)
    got.logp.backward(upstream)
    clean.logp.backward(upstream)
    assert torch.equal(leaves["weight"].grad, clean_leaves["weight"].grad)
    assert torch.equal(leaves["hidden"].grad, clean_leaves["hidden"].grad)


# ---- what need not be computed (MATH section 6): counted, not timed ---------------------------------------------------

ROWS, D, V = 256, 16, 1024
PRODUCT = 2 * ROWS * D * V
# The head's product in float32 may be done in chunks of any size; nothing but whole products is counted.
SLACK = 1.05


def count_flops(backend: str, *, active: int = ROWS, frozen: tuple[str, ...] = ()) -> tuple[int, int]:
    """FLOP of the products of forward and of backward."""
    spec = HeadSpec(shape=(ROWS,), d=D, v=V)
    inputs = spec.make()
    with Watch() as forward:
        out, _ = call(inputs, spec, backend, frozen=frozen)
    upstream = torch.zeros(ROWS)
    upstream[:: ROWS // active] = 1.0
    with Watch() as back:
        out.logp.backward(upstream)
    return forward.products, back.products


def test_dense_cost(kernel: str) -> None:
    """One product forward, at most three backward (one of them the recompute)."""
    forward, back = count_flops(kernel)
    assert PRODUCT <= forward <= SLACK * PRODUCT
    assert 2 * PRODUCT <= back <= SLACK * 3 * PRODUCT


def test_backward_costs_active_rows_only(kernel: str) -> None:
    """With an eighth of the rows active the backward costs an eighth."""
    _, dense = count_flops(kernel)
    _, sparse = count_flops(kernel, active=ROWS // 8)
    assert 0 < sparse <= SLACK * dense / 8


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_leaf_costs_no_product(frozen: str, kernel: str) -> None:
    """A frozen head costs no dW, a frozen body no dh: one product less."""
    _, both = count_flops(kernel)
    _, one = count_flops(kernel, frozen=(frozen,))
    assert one <= both - PRODUCT / SLACK


def test_logits_stay_in_a_bounded_workspace(kernel: str) -> None:
    """512 rows by a vocabulary of 151,936 would be 297 MiB of float32 logits; no tensor may come near."""
    spec = HeadSpec(shape=(512,), d=2, v=151_936, dtype=torch.bfloat16)
    inputs = spec.make()
    with Watch() as watch:
        out, _ = call(inputs, spec, kernel)
        upstream = torch.zeros(512)
        upstream[::8] = 1.0
        out.logp.backward(upstream)
    # An eighth of the logits in float32, 37 MiB: several such tensors still leave room below the bar of 400 MiB.
    assert watch.largest <= 512 * 151_936 / 8


def test_no_row_active_costs_nothing(backend: str) -> None:
    """All upstreams 0: gradients are zeros, not None and not NaN."""
    spec = HeadSpec(bias=True)
    got, leaves = call(spec.make(), spec, backend)
    got.logp.backward(torch.zeros(5))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


# ---- the comparator bites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_planted_errors_are_refused(dtype: torch.dtype) -> None:
    """Ten bounds on one element, or ten mean bounds on all, must fail; a bound is a small share of the signal."""
    spec = HeadSpec(shape=(17,), d=33, v=257, dtype=dtype, entropy=True)
    inputs, upstream = spec.make(), draw_upstream(spec)
    want, want_grad = run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = run_oracle(inputs, upstream, torch.float32)
    noise = tolerance.logp_noise(want, inputs["hidden"], inputs["weight"], 1.0, dtype)
    draw, draw_noise = tolerance.dlogit_noise(
        want, inputs["tokens"], upstream["logp"], upstream["entropy"], 0.0, noise, scale=1.0, softcap=None, dtype=dtype
    )  # fmt: skip
    cases = {
        "logp": (want.logp, eager.logp, torch.float32, noise),
        "entropy": (want.entropy, eager.entropy, torch.float32, noise),
        "dhidden": (
            want_grad["hidden"],
            eager_grad["hidden"],
            dtype,
            tolerance.product_noise(draw_noise, draw, inputs["weight"], dtype),
        ),
        "dweight": (
            want_grad["weight"],
            eager_grad["weight"],
            dtype,
            tolerance.product_noise(draw_noise.T, draw.T, inputs["hidden"], dtype),
        ),
    }
    for name, (value, plain, out_dtype, spread) in cases.items():
        limit = tolerance.bound(value, plain, out_dtype, spread)
        share = tolerance.SHARE[out_dtype]
        assert limit.largest <= share * float(value.detach().abs().max()), f"{name}: the bound is too loose to prove anything"
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
