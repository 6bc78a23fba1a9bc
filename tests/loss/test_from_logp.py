"""roma_loss_from_logp against the oracle: value, choice of view and every gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import compare_logp, strategies, tolerance
from roma.testing.strategies import LossSpec, loss_specs


@given(spec=loss_specs())
@example(spec=LossSpec(difficulty="views_identical", k=4, config=RomaConfig(worst_over="token")))
@example(spec=LossSpec(difficulty="nan_when_masked", packed=True, token_advantages=True))
@example(spec=LossSpec(difficulty="row_all_masked", packed=True))
@example(spec=LossSpec(difficulty="far_ratios", config=RomaConfig(penalty_ratio="clean/view")))
def test_values_and_gradients(spec: LossSpec, backend: str) -> None:
    """Every option, padded and packed, under every difficulty."""
    compare_logp.check_against_oracle(spec, backend)


@pytest.mark.parametrize("difficulty", strategies.LOSS_DIFFICULTIES)
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
@pytest.mark.parametrize("penalty_ratio", ["view/clean", "clean/view"])
def test_penalty_options(
    difficulty: str, worst_over: str, penalty_ratio: str, backend: str
) -> None:
    """The whole grid of the penalty's options, so that none hangs on what Hypothesis draws."""
    config = RomaConfig(worst_over=worst_over, penalty_ratio=penalty_ratio, lambda_inv=2.0)
    for seed, penalty_over in enumerate(["all", "correct"]):
        spec = LossSpec(
            b=5,
            t=7,
            k=3,
            seed=seed,
            difficulty=difficulty,
            config=replace(config, penalty_over=penalty_over),
        )
        compare_logp.check_against_oracle(spec, backend)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aux_old", ["clean", "view"])
@pytest.mark.parametrize("difficulty", ["plain", "at_clip_edge", "far_ratios", "row_all_masked"])
def test_surrogate_options(
    aggregation: str, dual_clip: float | None, aux_old: str, difficulty: str, backend: str
) -> None:
    """The whole grid of the clipped losses' options."""
    config = RomaConfig(
        aggregation=aggregation,
        dual_clip=dual_clip,
        aux_old=aux_old,
        ref_coef=0.1,
        max_length=11,
        lambda_inv=0.5,
    )
    for seed, totals in enumerate(["own", "number", "tensor"]):
        spec = LossSpec(b=5, t=7, seed=seed, difficulty=difficulty, totals=totals, config=config)
        compare_logp.check_against_oracle(spec, backend)


@pytest.mark.parametrize("lambda_aux", [0.0, 1.0])
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
def test_gradcheck_reference(worst_over: str, lambda_aux: float) -> None:
    """Finite differences in float64.

    By view_logp in full, by logp without the penalty (its clean side is a constant).
    """
    config = RomaConfig(worst_over=worst_over, lambda_aux=lambda_aux, dual_clip=1.5)
    spec = LossSpec(b=3, t=4, k=3, config=config)
    case = spec.make_logp(torch.float64)

    def by_view(view_logp: Tensor) -> Tensor:
        return compare_logp.call(case | {"view_logp": view_logp}, "reference").loss

    def by_logp(logp: Tensor) -> Tensor:
        return compare_logp.call(
            case | {"logp": logp, "config": replace(config, lambda_inv=0.0)}, "reference"
        ).loss

    assert torch.autograd.gradcheck(by_view, (case["view_logp"].clone().requires_grad_(),))
    assert torch.autograd.gradcheck(by_logp, (case["logp"].clone().requires_grad_(),))


@given(spec=loss_specs())
def test_float64_reference(spec: LossSpec) -> None:
    """In float64 the reference is the oracle to float64's rounding."""
    case = spec.make_logp(torch.float64)
    mine, theirs = compare_logp.on_leaves(case), compare_logp.on_leaves(case)
    got = compare_logp.call(mine, "reference")
    want = compare_logp.expect(theirs, worst_view=got.worst_view if spec.k else None)
    reach = max(want.reach, 1.0)
    compare_logp.require_clear_of_kinks(want, tolerance.eps(torch.float64) * reach)
    for result, value in (
        (got.loss, want.loss),
        (got.metrics["roma_penalty_worst"], want.scalar("inv")),
    ):
        assert result.dtype == torch.float64
        size = float(torch.cat(list(want.terms.values())).detach().abs().sum())
        assert abs(float(result.detach() - value.detach())) <= tolerance.many(
            reach * (1 + size), torch.float64
        )
    if got.loss.requires_grad:
        got.loss.backward()
    for name, g in zip(
        compare_logp.LOGPS,
        compare_logp.slopes(want.loss, [theirs[n] for n in compare_logp.LOGPS]),
        strict=True,
    ):
        if mine[name].grad is not None:
            off = float((mine[name].grad - g).abs().sum())
            assert off <= tolerance.many(reach * (1 + float(g.abs().sum())), torch.float64)


@given(spec=loss_specs())
def test_view_divergence(spec: LossSpec) -> None:
    """What a trainer picks views by beforehand is what the loss compares."""
    config = replace(spec.config, worst_over="sequence")
    case = spec.make_logp() | {"config": config}
    leaves = [case[name].requires_grad_() for name in compare_logp.LOGPS]
    got = roma.view_divergence(*leaves, case["mask"], cu_seqlens=case["cu_seqlens"], config=config)
    assert not got.requires_grad
    want, eager = compare_logp.expect(case), compare_logp.expect(case, dtype=torch.float32)
    noise = tolerance.eps(torch.float32) * max(want.reach, 1.0)
    spread = compare_logp.penalty_noise(want, noise, math.exp(want.reach))
    how = {"dtype": torch.float32, "noise": spread}
    tolerance.check("divergence", got, want.penalty.T, eager.penalty.T, **how)


def test_result_types(backend: str) -> None:
    """The loss alone is differentiable; all else is detached."""
    case = compare_logp.on_leaves(LossSpec().make_logp())
    got = compare_logp.call(case, backend)
    assert got.loss.shape == () and got.loss.dtype == torch.float32 and got.loss.requires_grad
    assert got.metrics.keys() == compare_logp.METRICS == set(roma.METRICS)
    for name, value in got.metrics.items():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad, name
        assert bool(torch.isfinite(value)), name
    assert torch.equal(got.metrics["loss"], got.loss.detach())


def test_default_config_is_romaconfig(backend: str) -> None:
    """Leaving config out means RomaConfig(), and its defaults are the contract's."""
    case = LossSpec(aux=True).make_logp()
    with_default = compare_logp.call({k: v for k, v in case.items() if k != "config"}, backend)
    given = compare_logp.call(case | {"config": RomaConfig()}, backend)
    assert torch.equal(with_default.loss, given.loss)
    defaults = RomaConfig()
    assert (defaults.lambda_inv, defaults.lambda_aux, defaults.log_ratio_clamp) == (1.0, 0.5, 20.0)
    assert (defaults.clip_low, defaults.clip_high, defaults.dual_clip, defaults.ref_coef) == (
        0.2,
        0.3,
        3.0,
        0.0,
    )
    assert (defaults.penalty_ratio, defaults.worst_over, defaults.penalty_over) == (
        "view/clean",
        "sequence",
        "all",
    )
    assert (defaults.main, defaults.aggregation, defaults.aux_old) == ("grpo", "grpo", "clean")
    assert (defaults.temperature, defaults.softcap, defaults.max_length) == (1.0, None, None)


def test_constants_are_not_differentiated(backend: str) -> None:
    """Old and reference log-probs and advantages get no gradient even if they ask for one."""
    config = RomaConfig(ref_coef=0.1, aux_old="view")
    case = compare_logp.on_leaves(LossSpec(config=config).make_logp())
    constants = ("old_logp", "ref_logp", "view_old_logp", "advantages")
    for name in constants:
        case[name] = case[name].clone().requires_grad_()
    compare_logp.call(case, backend).loss.backward()
    for name in constants:
        grad = case[name].grad
        assert grad is None or not bool(grad.any()), name


def test_clean_side_of_the_penalty_is_a_constant(backend: str) -> None:
    """Stop-gradient: the penalty alone gives the clean log-probs no gradient."""
    config = RomaConfig(main=None, lambda_aux=0.0)
    case = compare_logp.on_leaves(LossSpec(b=5, difficulty="all_right", config=config).make_logp())
    compare_logp.call(case, backend).loss.backward()
    assert case["logp"].grad is None or not bool(case["logp"].grad.any())
    assert bool(case["view_logp"].grad.any())


MUTANTS = {
    "λ_inv forgotten": lambda case: {"config": replace(case["config"], lambda_inv=1.001)},
    "λ_aux forgotten": lambda case: {"config": replace(case["config"], lambda_aux=0.501)},
    "other direction": lambda case: {"config": replace(case["config"], penalty_ratio="clean/view")},
    "mean in place of max": lambda case: {"config": replace(case["config"], worst_over="mean")},
    "max by token": lambda case: {"config": replace(case["config"], worst_over="token")},
    "max by batch": lambda case: {"config": replace(case["config"], worst_over="batch")},
    "correctness ignored": lambda case: {"correct": torch.ones_like(case["correct"])},
    "other denominator": lambda case: {"config": replace(case["config"], penalty_over="correct")},
    "token mean": lambda case: {"config": replace(case["config"], aggregation="dapo")},
    "no dual clip": lambda case: {"config": replace(case["config"], dual_clip=None)},
    "symmetric clip": lambda case: {"config": replace(case["config"], clip_high=0.2)},
    "wrong sampled view": lambda case: {"aux_view": 1 - case["aux_view"]},
    "mask ignored": lambda case: {"mask": torch.ones_like(case["mask"])},
    "no clamp": lambda case: {"config": replace(case["config"], log_ratio_clamp=20.0)},
    "global count ignored": lambda case: {"total_sequences": None},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_comparator_catches(mutant: str) -> None:
    """Each wrong reading of MATH.md moves the loss by far more than the bound."""
    config = RomaConfig(log_ratio_clamp=1.0)
    spec = LossSpec(b=8, t=12, seed=5, config=config, totals="number")
    case = spec.make_logp()
    # Ratios wide enough that every clip has work to do.
    case["old_logp"] = case["logp"] + 2.5 * (case["old_logp"] - case["logp"])
    case["view_logp"] = case["logp"] + 2.0 * (case["view_logp"] - case["logp"])
    case["config"] = replace(config, dual_clip=1.5)
    theirs = compare_logp.on_leaves(case)
    want, eager = compare_logp.expect(theirs), compare_logp.expect(case, dtype=torch.float32)
    noise = tolerance.eps(torch.float32) * max(want.reach, 1.0)
    terms = torch.cat(list(want.terms.values()))
    slopes = compare_logp.slopes(want.loss, [theirs[n] for n in compare_logp.LOGPS])
    spread = tolerance.scalar_noise(terms, slopes, noise)
    wrong = compare_logp.expect(case | MUTANTS[mutant](case)).loss.detach()
    limit = tolerance.bound(want.loss, eager.loss, torch.float32, spread)
    assert abs(float(wrong - want.loss.detach())) > tolerance.PLANTED * limit.largest
    assert tolerance.refuses(
        "loss", wrong.float(), want.loss, eager.loss, dtype=torch.float32, noise=spread
    )
