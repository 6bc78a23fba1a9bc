"""The loss on pairs (view, sequence): what it must equal, and what it must not read."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from support.pairs import PairSpec, counted, laid_out, needed, on_pairs, spans, two_pass
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import compare_whole, count_products, tolerance
from roma.testing.strategies import LossSpec, configs, loss_specs

# Sweep and loss are those of the dense form, of which test_roma_loss.py draws more.
FEWER = settings(max_examples=max(settings.default.max_examples // 4, 1))
WORST_OVER = ("sequence", "token", "batch", "mean")


def of(spec: LossSpec, **more: Any) -> PairSpec:
    """The same call with the pairs that matter."""
    own = {field.name: getattr(spec, field.name) for field in fields(LossSpec)}
    return PairSpec(**own | {"own": False} | more)


def check(spec: PairSpec, backend: str, **options: Any) -> None:
    """The kept pairs alone, held to the oracle."""
    keep = spec.kept(LossSpec.make(spec))

    def candidate(*tensors: Tensor, **named: Any) -> roma.RomaLoss:
        return on_pairs(backend, seed=spec.seed, **options)(*tensors, keep=keep, **named)

    compare_whole.check_against_oracle(spec, candidate)


@FEWER
@given(spec=loss_specs())
@example(spec=LossSpec(k=4, packed=True, difficulty="nan_when_masked", dtype=torch.bfloat16))
@example(spec=LossSpec(b=2, t=1, k=2, difficulty="views_identical", bias=True))
def test_all_pairs_in_any_order(spec: LossSpec, backend: str) -> None:
    """Every option, dtype, form and difficulty; NaN rows between the pairs are not read."""
    compare_whole.check_against_oracle(spec, on_pairs(backend, seed=spec.seed))


@FEWER
@given(spec=loss_specs(own=False))
@example(spec=LossSpec(k=4, difficulty="all_wrong", token_advantages=True))
@example(spec=LossSpec(b=5, k=2, difficulty="all_right", packed=True, config=RomaConfig(main=None)))
@example(spec=LossSpec(k=2, difficulty="zero_advantages", config=RomaConfig(lambda_inv=0.0)))
def test_needed_pairs(spec: LossSpec, backend: str) -> None:
    """A pair that is not there is the clean image, without a gradient."""
    check(of(spec), backend)


@FEWER
@given(
    spec=loss_specs(
        configs(worst_over="sequence") | configs(worst_over="batch"), own=False, k=4, b=5
    )
)
def test_the_worst_pairs_alone(spec: LossSpec, backend: str) -> None:
    """What a second pass runs."""
    check(of(spec, keep="two_pass"), backend)


LEAVES = compare_whole.LEAVES


def double(spec: LossSpec) -> dict[str, Any]:
    """A case in float64, sequence 3 without an advantage."""
    case = compare_whole.on_leaves(spec.make(), torch.float64)
    for name in ("advantages", "old_logp", "ref_logp"):
        case[name] = case[name].double()
    by_token = case["advantages"].shape != (spec.b,)
    numbers = torch.arange(spec.b).repeat_interleave(spans(case)).view(case["mask"].shape)
    still = (numbers if by_token else torch.arange(spec.b)) == 3
    return case | {"advantages": case["advantages"].masked_fill(still, 0)}


def outcome(case: dict[str, Any], out: roma.RomaLoss) -> dict[str, Tensor]:
    """Loss, metrics, choices of the right sequences, and each gradient."""
    named = {name: case[name] for name in LEAVES if case[name] is not None}
    found = torch.autograd.grad(out.loss, list(named.values()))
    worst = out.worst_view
    if worst.ndim:
        right = case["correct"] & (counted(case) > 0)
        by_token = case["config"].worst_over == "token"
        worst = worst.flatten()[right.repeat_interleave(spans(case)) if by_token else right]
    gradients = {f"d{name}": g for name, g in zip(named, found, strict=True)}
    return out.metrics | gradients | {"loss": out.loss.detach(), "worst_view": worst}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """To rounding in float64, which is less than 1e-13 of the largest entry, or of one nat."""
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        size = 1 + float(value.abs().max()) if value.numel() else 1.0
        limit = 0.0 if name == "worst_view" else tolerance.many(size, torch.float64)
        assert limit <= 1e-13 * size
        assert bool(((got[name] - value).abs() <= limit).all()), name


@pytest.mark.parametrize("float64", ["reference", "torch"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("worst_over", WORST_OVER)
def test_as_if_all_pairs_were_run(worst_over: str, packed: bool, float64: str) -> None:
    """The pairs that matter, and for one worst view a sequence or batch that view alone."""
    ratios = ("view/clean", "clean/view")
    difficulties = ("plain", "all_wrong", "all_right", "row_all_masked")
    for k, ratio, difficulty in itertools.product((1, 2, 4), ratios, difficulties):
        config = RomaConfig(
            worst_over=worst_over, penalty_ratio=ratio, penalty_over="correct", ref_coef=0.1
        )
        spec = LossSpec(
            b=5, t=4, k=k, packed=packed, config=config, bias=True, difficulty=difficulty,
            token_advantages=k == 2, seed=k,
        )  # fmt: skip
        case = double(spec)
        dense = compare_whole.call(case, float64)
        want, keep = outcome(case, dense), needed(case)
        assert k == 1 or int(keep.sum()) < keep.numel() or difficulty == "all_right"
        lean = compare_whole.call(laid_out(case, keep, seed=k), float64)
        assert_same(outcome(case, lean), want)
        if worst_over in ("sequence", "batch"):
            fewer = laid_out(case, two_pass(case, dense.worst_view), seed=k)
            want.pop("roma_penalty_mean")  # that of the first pass
            assert_same(outcome(case, compare_whole.call(fewer, float64)), want)


def test_log_probs_of_an_absent_pair(backend: str) -> None:
    """Those of the clean image, as constants."""
    spec = LossSpec(b=5, t=6, k=4, seed=2)
    case = compare_whole.on_leaves(spec.make())
    out = compare_whole.call(laid_out(case, needed(case)), backend)
    absent = ~needed(case)
    assert bool(absent.any()) and not bool(absent.all())
    clean = out.logp.expand(out.view_logp.shape)
    assert torch.equal(out.view_logp[absent], clean[absent])
    (gradient,) = torch.autograd.grad(
        out.view_logp[absent].sum() + 0 * out.loss, case["hidden"], allow_unused=True
    )
    assert gradient is None or not bool(gradient.any())


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_was_run_is_computed(packed: bool, kernel: str) -> None:
    """One row of the head a counted token of a pair; rows of view_hidden without one stay 0."""
    spec = LossSpec(b=8, t=32, k=4, v=257, packed=packed, seed=3)
    case = spec.make()
    keep, lengths = needed(case), counted(case)
    called = compare_whole.on_leaves(laid_out(case, keep))
    with count_products() as count:
        out = compare_whole.call(called, kernel)
        out.loss.backward()
    rows = int(lengths.sum() + (keep * lengths).sum())
    every = int(lengths.sum()) * 5
    assert rows <= count.rows("forward", 257) < rows + 128 < every
    gradient = called["view_hidden"].grad
    alive = gradient.flatten(0, -2).any(-1)
    junk = called["view_hidden"].detach().flatten(0, -2).isnan().any(-1)
    assert bool(junk.any()) and not bool((alive & junk).any())
    right = (case["correct"] * lengths).sum()
    assert right <= alive.sum() <= right + lengths.sum()
    assert count.rows("dhidden", 257) <= 2 * lengths.sum() + right


@pytest.mark.parametrize("views", [None, 0, 2])
def test_no_pair_at_all(views: int | None, backend: str) -> None:
    """With nothing to penalise, or no rollout right, it is the loss without views."""
    off = RomaConfig(lambda_inv=0.0)
    plain = compare_whole.on_leaves(LossSpec(k=0, aux=False, config=off, bias=True).make())
    leaves = [plain[name] for name in ("hidden", "weight", "bias")]
    states = None if views is None else torch.full((views, *plain["hidden"].shape[1:]), torch.nan)
    rows = {"view_hidden": states, "view_rows": torch.full((3, len(plain["correct"])), -1)}
    wrong = {"correct": torch.zeros_like(plain["correct"]), "config": RomaConfig()}
    faded = {"config": RomaConfig(lambda_inv=torch.tensor(0.0))}
    want = compare_whole.call(plain, backend)
    gradients = torch.autograd.grad(want.loss, leaves)
    for change in ({}, wrong, faded):
        got = compare_whole.call(plain | rows | change, backend)
        assert got.view_logp.shape == (3, *got.logp.shape)
        assert float(got.metrics["roma_penalty_mean"]) == 0
        pairs = zip(torch.autograd.grad(got.loss, leaves), gradients, strict=True)
        for mine, theirs in [(got.loss, want.loss), *pairs]:
            limit = tolerance.many(1 + float(theirs.detach().abs().max()))
            assert float((mine - theirs).detach().abs().max()) <= limit


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_token(shape: tuple[int, int], backend: str) -> None:
    """A rank without work: no sequence, or sequences of length 0."""
    (b, t), k = shape, 2
    hidden, weight = torch.zeros(b, t, 8, requires_grad=True), torch.ones(9, 8, requires_grad=True)
    out = roma.roma_loss(
        hidden,
        torch.zeros(k * b, t, 8),
        weight,
        torch.zeros(b, t, dtype=torch.int64),
        mask=torch.ones(b, t, dtype=torch.bool),
        advantages=torch.ones(b),
        correct=torch.ones(b, dtype=torch.bool),
        aux_view=torch.zeros(b, dtype=torch.int64),
        view_rows=torch.arange(k * b).view(k, b),
        backend=backend,
    )
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0 and out.view_logp.shape == (k, b, t)


def swapped(case: dict[str, Any], absent: Tensor) -> dict[str, Any]:
    """Two sequences have one another's rows."""
    return case | {"view_rows": case["view_rows"].roll(1, dims=1)}


def shifted(case: dict[str, Any], absent: Tensor) -> dict[str, Any]:
    """Each token is read one position too late."""
    return case | {"view_hidden": case["view_hidden"].roll(-1, dims=-2)}


def other_view(case: dict[str, Any], absent: Tensor) -> dict[str, Any]:
    """Rows of one view for those of another."""
    return case | {"view_rows": case["view_rows"].flip(0)}


def leaking(case: dict[str, Any], absent: Tensor) -> dict[str, Any]:
    """A pair that is not there takes part, with the states of another row."""
    rows = case["view_rows"].amax(0, keepdim=True).expand(case["view_rows"].shape)
    return case | {"view_hidden": case["view_hidden"][rows], "view_rows": None}


PLANTED = {f.__name__: f for f in (swapped, shifted, other_view, leaking)}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("worst_over", WORST_OVER)
def test_planted_errors_are_refused(name: str, worst_over: str) -> None:
    config = RomaConfig(worst_over=worst_over)
    spec = of(LossSpec(b=4, t=5, k=3, config=config, difficulty="all_right", seed=5))
    if name == "leaking":  # of right sequences some must be absent
        spec = of(spec, keep="two_pass", config=RomaConfig(worst_over="sequence"))
    keep = spec.kept(LossSpec.make(spec))

    def candidate(*tensors: Tensor, **named: Any) -> roma.RomaLoss:
        case = dict(zip(("hidden", "view_hidden", "weight", "tokens"), tensors, strict=True))
        called = laid_out(case | named, keep, spare=0)
        return roma.roma_loss(**PLANTED[name](called, ~keep), backend="torch")

    with pytest.raises(AssertionError):
        compare_whole.check_against_oracle(spec, candidate)
