"""The whole of roma_loss, from hidden states to every gradient, padded and packed, against the oracle."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import strategies
import tolerance
import torch
from counting import Watch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import LossSpec, configs, loss_specs
from test_view_loss import METRICS, SCALARS, check_choice, penalty_noise, require_clear_of_kinks, slopes
from torch import Tensor

import roma
from roma import RomaConfig

LEAVES = ("hidden", "view_hidden", "weight", "bias")


def on_leaves(case: dict[str, Any], dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same case with fresh leaves, differentiable unless frozen."""
    fresh = {
        name: case[name].detach().clone().to(dtype or case[name].dtype).requires_grad_(name not in frozen)
        for name in LEAVES
        if case[name] is not None
    }
    return case | fresh


def split(case: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The positional and the keyword arguments of roma_loss."""
    positional = ("hidden", "view_hidden", "weight", "tokens")
    return tuple(case[n] for n in positional), {n: x for n, x in case.items() if n not in positional}


def call(case: dict[str, Any], backend: str):
    """The public function on a case of the strategies."""
    positional, named = split(case)
    return roma.roma_loss(*positional, **named, backend=backend)


def expect(case: dict[str, Any], **how: Any) -> oracle.Expected:
    """The oracle on the same case."""
    positional, named = split(case)
    return oracle.roma_loss(*positional, **named, **how)


def stack_rows(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [(K+1)·n, D] and tokens of all counted rows, clean ones first; and the counted places."""
    counted = case["mask"].reshape(-1).nonzero()[:, 0]
    d = case["hidden"].shape[-1]
    states = [case["hidden"], *case["view_hidden"]]
    flat = torch.cat([x.detach().reshape(-1, d)[counted] for x in states])
    return flat, case["tokens"].reshape(-1)[counted].repeat(len(states)), counted


def check_against_oracle(spec: LossSpec, backend: str, frozen: tuple[str, ...] = ()) -> None:
    """One call: log-probs, loss, metrics, worst view, and dh, d(view)h, dW, db under a random upstream gradient."""
    case = spec.make()
    accumulate = tolerance.accumulator(spec.dtype)
    mine = on_leaves(case, frozen=frozen)
    got = call(mine, backend)
    upstream = torch.randn((), generator=strategies.generator(spec.seed + 1)).to(accumulate)
    if got.loss.requires_grad:
        (upstream * got.loss).backward()

    theirs, plain = on_leaves(case, torch.float64), on_leaves(case, accumulate)
    chosen = got.worst_view if spec.k else None
    want = expect(theirs, worst_view=chosen)
    eager = expect(plain, worst_view=chosen, dtype=accumulate)
    heads = list(want.heads.values())
    rows, targets, counted = stack_rows(case)
    stacked = oracle.Head(**{n: torch.cat([getattr(h, n) for h in heads]) for n in vars(heads[0])})
    scale = 1 / spec.config.temperature
    row_noise = tolerance.logp_noise(stacked, rows, case["weight"], scale, spec.dtype)
    worst = float(row_noise.max()) if len(row_noise) else 0.0
    # A log-ratio is a difference of two log-probs, one of them given.
    noise = 2 * worst + tolerance.eps(accumulate) * max(want.reach, 1.0)
    require_clear_of_kinks(want, noise)

    masked = ~case["mask"]
    for name in ("logp", "view_logp"):
        result, value, rough = getattr(got, name), getattr(want, name), getattr(eager, name)
        assert not result.requires_grad and bool((result[..., masked] == 0).all())
        tolerance.check(name, result, value, rough, dtype=accumulate, noise=worst)
    check_choice(got.worst_view, want, eager, penalty_noise(want, noise, math.exp(want.reach)), spec.config.worst_over)

    logps = [want.logp, want.view_logp]
    assert got.metrics.keys() == METRICS
    for metric, part in SCALARS.items():
        if metric == "pg_loss" and spec.config.ref_coef:
            continue
        value = want.loss if part is None else want.scalar(part)
        terms = torch.cat(list(want.terms.values())) if part is None else want.terms[part]
        rough = eager.loss if part is None else eager.scalar(part)
        spread = tolerance.scalar_noise(terms, slopes(value, logps, retain_graph=True), noise)
        tolerance.check(metric, got.metrics[metric], value, rough, dtype=accumulate, noise=spread)
        if part is None:
            tolerance.check("loss", got.loss, value, rough, dtype=accumulate, noise=spread)

    rate = slopes(want.loss, logps, create_graph=True, retain_graph=True)
    curve = slopes(sum(g.sum() for g in rate), logps, retain_graph=True)

    def by_row(pair: list[Tensor]) -> Tensor:
        whole = torch.cat([pair[0][None], pair[1]]).detach().reshape(spec.k + 1, -1)
        return whole[:, counted].reshape(-1) * float(upstream)

    g, h = by_row(rate), by_row(curve)
    draw, draw_noise = tolerance.dlogit_noise(
        stacked,
        targets,
        g,
        0.0,
        2 * noise * h.abs() + tolerance.eps(accumulate) * g.abs(),
        row_noise,
        scale=scale,
        softcap=spec.config.softcap,
        dtype=spec.dtype,
    )
    by_state = tolerance.product_noise(draw_noise, draw, case["weight"], spec.dtype)
    largest = by_state.amax() if by_state.numel() else 0.0
    spreads = {
        "hidden": largest,
        "view_hidden": largest,
        "weight": tolerance.product_noise(draw_noise.T, draw.T, rows, spec.dtype),
        "bias": tolerance.product_noise(draw_noise.T, draw.T, torch.ones(len(rows), 1), spec.dtype)[:, 0],
    }
    names = [n for n in LEAVES if case[n] is not None]
    truth = slopes(want.loss, [theirs[n] for n in names], retain_graph=True)
    rough = slopes(eager.loss, [plain[n] for n in names], retain_graph=True)
    for name, value, e in zip(names, truth, rough, strict=True):
        grad = mine[name].grad
        if name in frozen:
            assert grad is None, f"{name} is frozen"
            continue
        if grad is None:  # nothing depends on it
            assert not bool(value.any()), name
            continue
        if name in ("hidden", "view_hidden"):
            assert bool((grad[..., masked, :] == 0).all()), f"d{name} on masked positions"
        tolerance.check(
            f"d{name}",
            grad,
            upstream * value,
            upstream * e,
            dtype=mine[name].dtype,
            noise=spreads[name],
        )


@given(spec=loss_specs())
@example(spec=LossSpec(v=129, k=4, packed=True, difficulty="nan_when_masked", bias=True, dtype=torch.bfloat16))
@example(spec=LossSpec(v=127, head_difficulty="peaked_tail", config=RomaConfig(softcap=5.0, temperature=0.7)))
def test_values_and_gradients(spec: LossSpec, backend: str) -> None:
    """Every option, dtype, form and difficulty."""
    check_against_oracle(spec, backend)


@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_worst_over_by_dtype(worst_over: str, dtype: torch.dtype, packed: bool, backend: str) -> None:
    """The grid that a Hypothesis run may miss, at a size with several sequences and views."""
    config = RomaConfig(worst_over=worst_over, ref_coef=0.05)
    for seed in range(3):
        spec = LossSpec(b=4, t=6, k=3, seed=seed, packed=packed, config=config, dtype=dtype, v=129, bias=True)
        check_against_oracle(spec, backend)


@given(
    spec=loss_specs(dtype=torch.float32, bias=True, difficulty="plain"),
    frozen=st.sampled_from([("weight",), ("hidden",), ("view_hidden",), ("hidden", "view_hidden"), ("weight", "bias")]),
)
def test_frozen_parts(spec: LossSpec, frozen: tuple[str, ...], backend: str) -> None:
    """A frozen argument gets no gradient, and the others' do not change."""
    check_against_oracle(spec, backend, frozen)


@given(spec=loss_specs(dtype=torch.float32))
def test_same_as_through_log_probs(spec: LossSpec, backend: str) -> None:
    """roma_loss is linear_logprob followed by roma_loss_from_logp, bit for bit where nothing is masked out."""
    case = spec.make()
    whole = call(case, backend)
    named = split(case)[1]
    for name in ("bias", "config"):
        named.pop(name)
    again = roma.roma_loss_from_logp(whole.logp, whole.view_logp, **named, config=spec.config, backend=backend)
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.worst_view, whole.worst_view)
    for name, value in whole.metrics.items():
        assert torch.equal(value, again.metrics[name]), name


@given(spec=loss_specs(packed=False))
def test_packed_equals_padded(spec: LossSpec, backend: str) -> None:
    """Both forms of the same sequences agree; both lie within the bound, so within two bounds of each other."""
    padded, packed = spec.make(), replace(spec, packed=True).make()
    a, b = call(padded, backend), call(packed, backend)
    want = expect(padded)
    noise = 2 * tolerance.eps(torch.float32) * (1 + float(want.logp.abs().max()))
    require_clear_of_kinks(want, noise)
    size = float(torch.cat(list(want.terms.values())).abs().sum()) * (1 + spec.config.lambda_inv) + noise
    assert abs(float(a.loss - b.loss)) <= 8 * tolerance.SIGMAS * noise * size * (1 + math.exp(want.reach))
    assert a.logp[padded["mask"]].shape == b.logp[packed["mask"]].shape


@given(spec=loss_specs(difficulty="nan_when_masked", dtype=torch.float32))
def test_masked_hidden_states_may_be_anything(spec: LossSpec, backend: str) -> None:
    """Garbage in masked rows, infinite ones included, changes no bit of loss and gradient."""
    clean, dirty = on_leaves(spec.make()), spec.make()
    masked = ~dirty["mask"]
    for name, junk in (("hidden", float("inf")), ("view_hidden", float("nan"))):
        dirty[name] = dirty[name].masked_fill(masked[..., None], junk)
    dirty = on_leaves(dirty)
    a, b = call(clean, backend), call(dirty, backend)
    assert torch.equal(a.loss.detach(), b.loss.detach())
    if a.loss.requires_grad:
        a.loss.backward()
        b.loss.backward()
    for name in LEAVES:
        first, second = (c[name].grad if c[name] is not None else None for c in (clean, dirty))
        assert (first is None and second is None) or torch.equal(first, second), name


def test_no_views(backend: str) -> None:
    """K = 0 with λ_inv = 0 is plain GRPO, whether views are None or empty."""
    config = RomaConfig(lambda_inv=0.0)
    case = LossSpec(k=0, config=config).make()
    empty, absent = call(case, backend), call(case | {"view_hidden": None}, backend)
    assert torch.equal(empty.loss, absent.loss)
    assert absent.view_logp.shape == (0, *case["mask"].shape)


def test_everything_masked(backend: str) -> None:
    """No counted token: zero loss, zero gradients, no NaN."""
    case = on_leaves(LossSpec(difficulty="everything_masked", bias=True).make())
    got = call(case, backend)
    got.loss.backward()
    assert float(got.loss.detach()) == 0.0
    for name in LEAVES:
        grad = case[name].grad
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name


@given(spec=loss_specs())
def test_same_input_twice_is_bitwise_equal(spec: LossSpec, backend: str) -> None:
    """Two runs agree to the last bit."""
    runs = []
    for _ in range(2):
        case = on_leaves(spec.make())
        got = call(case, backend)
        if got.loss.requires_grad:
            got.loss.backward()
        grads = [case[n].grad for n in LEAVES if case[n] is not None]
        runs.append([got.loss.detach(), got.logp, got.view_logp, got.worst_view, *grads])
    for first, second in zip(*runs, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@given(spec=loss_specs(dtype=torch.float32, config=configs(softcap=None), bias=True))
def test_gradient_by_bias_sums_to_zero(spec: LossSpec, backend: str) -> None:
    """Each dz sums to 0 over the vocabulary, so db does too."""
    case = on_leaves(spec.make())
    got = call(case, backend)
    if not got.loss.requires_grad:
        return
    got.loss.backward()
    db = case["bias"].grad.double()
    rows = len(stack_rows(case)[0])
    size = float(db.abs().sum()) + float(got.logp.abs().amax()) if rows else 0.0
    logps = expect(on_leaves(case, torch.float64))
    slope = sum(float(g.abs().sum()) for g in slopes(logps.loss, [logps.logp, logps.view_logp]))
    magnitude = 1 + max((float(h.z.detach().abs().max()) for h in logps.heads.values() if h.z.numel()), default=0.0)
    unit = tolerance.SIGMAS * tolerance.eps(torch.float32)
    assert abs(float(db.sum())) <= unit * (size + slope * magnitude * spec.v**0.5)


def test_sequence_choice_leaves_other_views_without_gradient(backend: str) -> None:
    """worst_over="sequence": exactly the winning view of each right sequence, and the sampled view, carry gradient."""
    spec = LossSpec(b=5, t=6, k=4, seed=2)
    case = on_leaves(spec.make())
    got = call(case, backend)
    got.loss.backward()
    for i in range(spec.b):
        allowed = {int(case["aux_view"][i])} | ({int(got.worst_view[i])} if case["correct"][i] else set())
        alive = {k for k in range(spec.k) if bool(case["view_hidden"].grad[k, i].any())}
        assert alive <= allowed
        assert not case["correct"][i] or int(got.worst_view[i]) in alive


def test_backward_follows_active_rows(kernel: str) -> None:
    """Without main and auxiliary loss the backward touches one view of the right sequences: B/2 of (K+1)·B rows."""
    b, t, k, d, v = 8, 16, 3, 16, 512
    g = strategies.generator(0)
    hidden = torch.randn(b, t, d, generator=g).requires_grad_()
    views = (hidden.detach() + 0.3 * torch.randn(k, b, t, d, generator=g)).requires_grad_()
    weight = torch.randn(v, d, generator=g).requires_grad_()
    with Watch() as forward:
        got = roma.roma_loss(
            hidden,
            views,
            weight,
            torch.randint(v, (b, t), generator=g),
            mask=torch.ones(b, t, dtype=torch.bool),
            advantages=torch.zeros(b),
            correct=torch.arange(b) < b // 2,
            old_logp=torch.zeros(b, t),
            config=RomaConfig(main=None),
            backend=kernel,
        )
    with Watch() as back:
        got.loss.backward()
    row = 2 * d * v
    assert forward.products <= 1.05 * (k + 1) * b * t * row
    assert 0 < back.products <= 1.05 * 3 * (b // 2) * t * row


def test_signatures_are_the_contract() -> None:
    """Names, order and what may be passed by position: DESIGN.md, "Public interface"."""
    shared = (
        "mask advantages correct old_logp ref_logp aux_view view_old_logp cu_seqlens "
        "total_sequences total_tokens total_correct config backend"
    ).split()
    expected = {
        roma.linear_logprob: (
            ["hidden", "weight", "tokens"],
            ["bias", "temperature", "softcap", "entropy", "backend"],
        ),
        roma.roma_loss: (["hidden", "view_hidden", "weight", "tokens"], ["bias", *shared]),
        roma.roma_loss_from_logp: (["logp", "view_logp"], shared),
    }
    for function, (positional, named) in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(named)
    got = call(LossSpec().make(), "reference")
    assert [n for n in ("loss", "logp", "view_logp", "worst_view", "metrics") if hasattr(got, n)] == list(got._fields)


# ---- the comparator bites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_planted_gradient_errors_are_refused(dtype: torch.dtype) -> None:
    """A term left out, another view, a missing 1/τ: the comparator refuses the dW of each."""
    config = RomaConfig(temperature=0.7)
    spec = LossSpec(b=6, t=8, k=3, dtype=dtype, v=129, config=config, seed=1)
    case = spec.make()

    def dweight(of: dict[str, Any], kind: torch.dtype, **how: Any) -> Tensor:
        leaves = on_leaves(of, kind)
        return torch.autograd.grad(expect(leaves, dtype=kind, **how).loss, leaves["weight"])[0]

    want, eager = dweight(case, torch.float64), dweight(case, torch.float32)
    wrong = {
        "no auxiliary loss": {"aux_view": None},
        "another view": {"aux_view": (case["aux_view"] + 1) % 3},
        "1/τ forgotten": {"config": replace(config, temperature=1.0)},
        "wrong rollouts penalised": {"correct": torch.ones(6, dtype=torch.bool)},
        "the other direction": {"config": replace(config, penalty_ratio="clean/view")},
    }
    for name, change in wrong.items():
        other = dweight(case | change, torch.float64).to(dtype)
        assert tolerance.refuses(name, other, want, eager, dtype=dtype), name
