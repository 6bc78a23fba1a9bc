"""roma_loss_from_logp: what must hold without knowing the right numbers (STYLE, rule 14)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given

from roma import RomaConfig
from roma.testing import compare_logp, tensors, tolerance
from roma.testing.strategies import LossSpec, configs, loss_specs


def same(cases: list[dict[str, Any]], backend: str, spec: LossSpec) -> list[Any]:
    """Assert equal losses, to rounding of the terms; returns all results."""
    results = [compare_logp.call(case, backend) for case in cases]
    want = compare_logp.expect(cases[0])
    size = float(torch.cat(list(want.terms.values())).detach().abs().sum()) * (
        1 + spec.config.lambda_inv
    )
    slack = tolerance.few(max(want.reach, 1.0) * size)
    first, *others = (float(result.loss.detach()) for result in results)
    for loss in others:
        assert abs(loss - first) <= slack
    return results


@given(spec=loss_specs(packed=False))
def test_order_of_rollouts_is_free(spec: LossSpec, backend: str) -> None:
    """Permuting sequences permutes the choices and leaves the loss."""
    case = spec.make_logp()
    order = torch.randperm(spec.b, generator=tensors.generator(spec.seed))
    a, b = same([case, compare_logp.take(case, order)], backend, spec)
    if spec.config.worst_over != "batch" and spec.k:
        assert torch.equal(a.worst_view[order], b.worst_view)


@given(spec=loss_specs(b=3, t=7, k=4, difficulty="plain", packed=False))
def test_order_of_views_is_free(spec: LossSpec, backend: str) -> None:
    """Permuting views permutes the choices (no ties here) and leaves the loss."""
    case = spec.make_logp()
    # Short sequences may tie exactly at 0 where everything is clamped: far from it under this
    # difficulty.
    order = torch.randperm(4, generator=tensors.generator(spec.seed))
    back = torch.argsort(order)
    aux = None if case["aux_view"] is None else back[case["aux_view"]]
    permuted = case | {"view_logp": case["view_logp"][order], "aux_view": aux}
    a, b = same([case, permuted], backend, spec)
    assume(
        spec.config.log_ratio_clamp > 2.0
        and (spec.config.worst_over != "batch" or bool(case["correct"].any()))
    )
    counted = b.worst_view >= 0
    assert torch.equal(a.worst_view[counted], order[b.worst_view[counted]])


@given(spec=loss_specs(packed=False))
def test_appending_masked_tokens_changes_nothing(spec: LossSpec, backend: str) -> None:
    """Three more columns of garbage under a False mask."""
    case = spec.make_logp()
    longer = dict(case)
    for name in (
        "logp",
        "old_logp",
        "ref_logp",
        "view_old_logp",
        "view_logp",
        "mask",
        "entropy",
        *(["advantages"] if spec.token_advantages else []),
        *(["rollout_weight"] if spec.weights == "token" else []),
    ):
        x = case[name]
        if x is None:
            continue
        junk = (
            torch.full((*x.shape[:-1], 3), float("nan"))
            if x.is_floating_point()
            else x.new_zeros(*x.shape[:-1], 3)
        )
        longer[name] = torch.cat([x, junk], dim=-1)
    a, b = same([case, longer], backend, spec)
    if spec.config.worst_over == "token":
        assert torch.equal(b.worst_view, torch.nn.functional.pad(a.worst_view, (0, 3), value=-1))
    else:
        assert torch.equal(a.worst_view, b.worst_view)


@given(spec=loss_specs(packed=False))
def test_packed_equals_padded(spec: LossSpec, backend: str) -> None:
    """The same sequences in both forms: same loss, same gradients, same choices."""
    padded = compare_logp.on_leaves(spec.make_logp())
    packed = compare_logp.on_leaves(replace(spec, packed=True).make_logp())
    a, b = same([padded, packed], backend, spec)
    if spec.config.worst_over != "token":
        assert torch.equal(a.worst_view, b.worst_view)
    if not a.loss.requires_grad:
        return
    a.loss.backward()
    b.loss.backward()
    for name in compare_logp.LOGPS:
        first, second = padded[name].grad, packed[name].grad
        if first is None:
            assert second is None or not bool(second.any())
            continue
        left, right = first[..., padded["mask"]], second[..., packed["mask"]]
        slack = tolerance.few(float(left.abs().amax())) if left.numel() else 0.0
        assert bool(((left - right).abs() <= slack).all()), name


@given(spec=loss_specs(config=configs(ref_coef=0.0, lambda_inv=0.0, entropy_coef=0.0)))
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_loss_scales_with_advantages(factor: float, spec: LossSpec, backend: str) -> None:
    """Both losses are homogeneous in A, clips included (by a power of two: bit for bit).

    But for numbers below the normal ones, which vespo's φ can be.
    """
    case = spec.make_logp()
    a, b = (
        compare_logp.call(case, backend),
        compare_logp.call(case | {"advantages": factor * case["advantages"]}, backend),
    )
    assert abs(float(b.loss) - factor * float(a.loss)) < torch.finfo(torch.float32).tiny


@given(spec=loss_specs(k=1, config=configs(lambda_inv=1.0, gate_bound=None, gate_tau=None)))
def test_one_view_is_the_plain_penalty(spec: LossSpec, backend: str) -> None:
    """With K = 1 all four ways of choosing agree."""
    case = spec.make_logp()
    ways = [
        case | {"config": replace(spec.config, worst_over=worst_over)}
        for worst_over in ("sequence", "token", "batch", "mean")
    ]
    same([case, *ways], backend, spec)


@given(
    spec=loss_specs(
        b=5,
        packed=False,
        config=(configs(worst_over="sequence") | configs(worst_over="token")).filter(
            lambda config: config.aggregation != "bnpo"  # which divides by a call's own tokens
        ),
    )
)
def test_shards_add_up(spec: LossSpec, backend: str) -> None:
    """Losses and gradients of micro-batches under global counts sum to the whole batch's."""
    case = compare_logp.on_leaves(spec.make_logp())
    whole = compare_logp.call(case, backend)
    counts = {
        "total_sequences": case.get("total_sequences", 5),
        "total_tokens": case.get("total_tokens", int(case["mask"].sum())),
        "total_correct": case.get("total_correct", int(case["correct"].sum())),
    }
    parts = compare_logp.on_leaves(spec.make_logp())
    losses = [
        compare_logp.call(compare_logp.take(parts, rows) | counts, backend).loss
        for rows in torch.tensor([0, 1, 2, 3, 4]).split([2, 1, 2])
    ]
    want = compare_logp.expect(case)
    size = float(torch.cat(list(want.terms.values())).detach().abs().sum()) * (
        1 + spec.config.lambda_inv
    )
    slack = tolerance.few(max(want.reach, 1.0) * size)
    assert abs(float(sum(losses).detach()) - float(whole.loss.detach())) <= slack
    if whole.loss.requires_grad:
        whole.loss.backward()
        sum(losses).backward()
        for name in compare_logp.LOGPS:
            first, second = case[name].grad, parts[name].grad
            if first is None:
                continue
            second = torch.zeros_like(first) if second is None else second
            close = tolerance.few(float(first.abs().sum()))
            assert bool(((first - second).abs() <= close).all()), name


@given(spec=loss_specs())
def test_same_input_twice_is_bitwise_equal(spec: LossSpec, backend: str) -> None:
    """Two runs agree to the last bit."""
    runs = []
    for _ in range(2):
        case = compare_logp.on_leaves(spec.make_logp())
        got = compare_logp.call(case, backend)
        if got.loss.requires_grad:
            got.loss.backward()
        runs.append(
            [
                got.loss.detach(),
                got.worst_view,
                *got.metrics.values(),
                case["logp"].grad,
                case["view_logp"].grad,
            ]
        )
    for first, second in zip(*runs, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@given(spec=loss_specs())
def test_back_ends_agree_on_metrics(spec: LossSpec) -> None:
    """Metrics never change with the back end.

    Same keys, same values to rounding, the unnamed ones too.
    """
    case = spec.make_logp()
    noise = tolerance.few(1.0)
    want = compare_logp.expect(case)
    compare_logp.require_clear_of_kinks(want, noise * max(want.reach, 1.0))
    reference = compare_logp.call(case, "reference").metrics
    got = compare_logp.call(case, "torch").metrics
    assert got.keys() == reference.keys()
    size = 1 + math.exp(want.reach) * float(case["mask"].sum())
    for name, value in got.items():
        assert abs(float(value - reference[name])) <= noise * size, name


def test_memory_layout_does_not_matter(backend: str) -> None:
    """Non-contiguous and expanded inputs give the same bits."""
    case = LossSpec(b=4, t=6, k=3, config=RomaConfig(ref_coef=0.1)).make_logp()
    odd = dict(case)
    for name in ("logp", "old_logp", "ref_logp", "mask"):
        odd[name] = case[name].t().contiguous().t()
    odd["view_logp"] = case["view_logp"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    a, b = compare_logp.call(compare_logp.on_leaves(case), backend), compare_logp.call(odd, backend)
    assert torch.equal(a.loss.detach(), b.loss) and torch.equal(a.worst_view, b.worst_view)
