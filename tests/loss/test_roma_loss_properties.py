"""roma_loss: what must hold without knowing the right numbers (STYLE, rule 14)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given

import roma
from roma import RomaConfig
from roma.testing import compare_logp, compare_whole, count_products, tensors, tolerance
from roma.testing.strategies import LossSpec, configs, loss_specs


@given(spec=loss_specs(dtype=torch.float32, config=configs(entropy_coef=0.0)))
def test_same_as_through_log_probs(spec: LossSpec, backend: str) -> None:
    """Whole loss and loss from its own log-probs agree bit for bit; it returns no entropies."""
    case = spec.make()
    whole = compare_whole.call(case, backend)
    named = compare_whole.split(case)[1]
    for name in ("bias", "config"):
        named.pop(name)
    again = roma.roma_loss_from_logp(
        whole.logp, whole.view_logp, **named, config=spec.config, backend=backend
    )
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.worst_view, whole.worst_view)
    for name, value in whole.metrics.items():
        assert torch.equal(value, again.metrics[name]), name


@given(spec=loss_specs(packed=False))
def test_packed_equals_padded(spec: LossSpec, backend: str) -> None:
    """Both forms of the same sequences agree.

    Both lie within the bound, so within two bounds of each other.
    """
    padded, packed = spec.make(), replace(spec, packed=True).make()
    a, b = compare_whole.call(padded, backend), compare_whole.call(packed, backend)
    want = compare_whole.expect(padded)
    noise = tolerance.few(1 + float(want.logp.abs().max()))
    compare_logp.require_clear_of_kinks(want, noise)
    size = (
        float(torch.cat(list(want.terms.values())).abs().sum()) * (1 + spec.config.lambda_inv)
        + noise
    )
    assert abs(float(a.loss - b.loss)) <= tolerance.SIGMAS * noise * size * (
        1 + math.exp(want.reach)
    )
    assert a.logp[padded["mask"]].shape == b.logp[packed["mask"]].shape


@given(spec=loss_specs(difficulty="nan_when_masked", dtype=torch.float32))
def test_masked_hidden_states_may_be_anything(spec: LossSpec, backend: str) -> None:
    """Garbage in masked rows, infinite ones included, changes no bit of loss and gradient."""
    clean, dirty = compare_whole.on_leaves(spec.make()), spec.make()
    masked = ~dirty["mask"]
    for name, junk in (("hidden", float("inf")), ("view_hidden", float("nan"))):
        dirty[name] = dirty[name].masked_fill(masked[..., None], junk)
    dirty = compare_whole.on_leaves(dirty)
    a, b = compare_whole.call(clean, backend), compare_whole.call(dirty, backend)
    assert torch.equal(a.loss.detach(), b.loss.detach())
    if a.loss.requires_grad:
        a.loss.backward()
        b.loss.backward()
    for name in compare_whole.LEAVES:
        first, second = (c[name].grad if c[name] is not None else None for c in (clean, dirty))
        assert (first is None and second is None) or torch.equal(first, second), name


def test_no_views(backend: str) -> None:
    """K = 0 with λ_inv = 0 is plain GRPO, whether views are None or empty."""
    config = RomaConfig(lambda_inv=0.0)
    case = LossSpec(k=0, config=config).make()
    empty, absent = (
        compare_whole.call(case, backend),
        compare_whole.call(case | {"view_hidden": None}, backend),
    )
    assert torch.equal(empty.loss, absent.loss)
    assert absent.view_logp.shape == (0, *case["mask"].shape)


def test_everything_masked(backend: str) -> None:
    """No counted token: zero loss, zero gradients, no NaN."""
    case = compare_whole.on_leaves(LossSpec(difficulty="everything_masked", bias=True).make())
    got = compare_whole.call(case, backend)
    got.loss.backward()
    assert float(got.loss.detach()) == 0.0
    for name in compare_whole.LEAVES:
        grad = case[name].grad
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name


@given(spec=loss_specs())
def test_same_input_twice_is_bitwise_equal(spec: LossSpec, backend: str) -> None:
    """Two runs agree to the last bit."""
    runs = []
    for _ in range(2):
        case = compare_whole.on_leaves(spec.make())
        got = compare_whole.call(case, backend)
        if got.loss.requires_grad:
            got.loss.backward()
        grads = [case[n].grad for n in compare_whole.LEAVES if case[n] is not None]
        runs.append([got.loss.detach(), got.logp, got.view_logp, got.worst_view, *grads])
    for first, second in zip(*runs, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@given(spec=loss_specs(dtype=torch.float32, config=configs(softcap=None), bias=True))
def test_gradient_by_bias_sums_to_zero(spec: LossSpec, backend: str) -> None:
    """Each dz sums to 0 over the vocabulary, so db does too."""
    case = compare_whole.on_leaves(spec.make())
    got = compare_whole.call(case, backend)
    if not got.loss.requires_grad:
        return
    got.loss.backward()
    db = case["bias"].grad.double()
    rows = len(compare_whole.stack_rows(case)[0])
    size = float(db.abs().sum()) + float(got.logp.abs().amax()) if rows else 0.0
    logps = compare_whole.expect(compare_whole.on_leaves(case, torch.float64))
    scored = [x for x in (logps.logp, logps.view_logp, logps.entropy) if x is not None]
    slope = sum(float(g.abs().sum()) for g in compare_logp.slopes(logps.loss, scored))
    magnitude = 1 + max(
        (float(h.z.detach().abs().max()) for h in logps.heads.values() if h.z.numel()), default=0.0
    )
    unit = tolerance.few(1.0)
    assert abs(float(db.sum())) <= unit * (size + slope * magnitude * spec.v**0.5)


def test_sequence_choice_leaves_other_views_without_gradient(backend: str) -> None:
    """worst_over="sequence".

    Exactly the winning view of each right sequence, and the sampled view, carry gradient.
    """
    spec = LossSpec(b=5, t=6, k=4, seed=2)
    case = compare_whole.on_leaves(spec.make())
    got = compare_whole.call(case, backend)
    got.loss.backward()
    for i in range(spec.b):
        allowed = {int(case["aux_view"][i])} | (
            {int(got.worst_view[i])} if case["correct"][i] else set()
        )
        alive = {k for k in range(spec.k) if bool(case["view_hidden"].grad[k, i].any())}
        assert alive <= allowed
        assert not case["correct"][i] or int(got.worst_view[i]) in alive


def test_backward_follows_active_rows(kernel: str) -> None:
    """Without main and auxiliary loss the backward touches one view of the right sequences.

    B/2 of (K+1)·B rows.
    """
    b, t, k, d, v = 16, 16, 3, 16, 512  # half of the sequences: a whole block of rows
    g = tensors.generator(0)
    hidden = torch.randn(b, t, d, generator=g).requires_grad_()
    views = (hidden.detach() + 0.3 * torch.randn(k, b, t, d, generator=g)).requires_grad_()
    weight = torch.randn(v, d, generator=g).requires_grad_()
    with count_products() as forward:
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
    with count_products() as back:
        got.loss.backward()
    row = 2 * d * v
    assert 0 < forward.flop <= 1.05 * (k + 1) * b * t * row
    assert 0 < back.flop <= 1.05 * 3 * (b // 2) * t * row
