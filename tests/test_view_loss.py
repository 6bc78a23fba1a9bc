"""roma_loss_from_logp against the oracle: value, choice of view, every gradient, and the properties of STYLE rule 14."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import strategies
import tolerance
import torch
from hypothesis import assume, currently_in_test_context, example, given
from strategies import LossSpec, configs, loss_specs
from torch import Tensor

import roma
from roma import RomaConfig

# The scalars that are compared by value: metric, and the oracle's part of the loss behind it.
SCALARS = {"loss": None, "roma_penalty_worst": "inv", "roma_aux_loss": "aux", "pg_loss": "main"}
METRICS = {
    "loss",
    "pg_loss",
    "pg_clipfrac_higher",
    "pg_clipfrac_lower",
    "ppo_kl",
    "ref_kl",
    "roma_aux_loss",
    "roma_aux_clipfrac",
    "roma_penalty_mean",
    "roma_penalty_worst",
}
LOGPS = ("logp", "view_logp")


def require_clear_of_kinks(want: oracle.Expected, noise: float) -> None:
    """Discard a drawn case in which rounding decides between two branches; a case chosen by hand must not be one."""
    clear = want.kink > tolerance.KINK_SIGMAS * noise
    if currently_in_test_context():
        assume(clear)
    assert clear, f"a log-ratio lies {want.kink:.1e} nats from a kink"


def on_leaves(case: dict[str, Any]) -> dict[str, Any]:
    """The same case with fresh differentiable logp and view_logp."""
    return case | {name: case[name].clone().requires_grad_() for name in LOGPS}


def call(case: dict[str, Any], backend: str):
    """The public function on a case of the strategies."""
    case = dict(case)
    return roma.roma_loss_from_logp(case.pop("logp"), case.pop("view_logp"), **case, backend=backend)


def expect(case: dict[str, Any], **how: Any) -> oracle.Expected:
    """The oracle on the same case."""
    case = dict(case)
    return oracle.view_loss(case.pop("logp"), case.pop("view_logp"), **case, **how)


def slopes(value: Tensor, leaves: list[Tensor], **how: Any) -> list[Tensor]:
    """Gradients by each leaf, zeros where value does not depend on it."""
    live = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(value, live, allow_unused=True, **how) if value.requires_grad else [])
    grads = [next(found, None) if x.requires_grad else None for x in leaves]
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def check_choice(got: Tensor, want: oracle.Expected, eager: oracle.Expected, noise: float, worst_over: str) -> None:
    """The chosen view's penalty is the largest, to rounding; masked tokens hold −1."""
    assert got.dtype == torch.int64 and got.shape == want.worst_view.shape and not got.requires_grad
    if want.penalty.shape[1] == 0:
        return
    limit = tolerance.bound(want.penalty, eager.penalty, torch.float32, noise).largest
    flat, by_oracle = got.reshape(-1), want.worst_view.reshape(-1)
    for row, (mine, theirs) in enumerate(zip(flat.tolist(), by_oracle.tolist(), strict=True)):
        if theirs < 0:
            assert worst_over == "token" and mine == -1
            continue
        values = want.penalty[row]
        assert 0 <= mine < len(values)
        assert float(values[theirs] - values[mine]) <= 2 * limit, f"row {row}: {values.tolist()}, chose {mine}"


def penalty_noise(want: oracle.Expected, logp_error: float, slope: float) -> float:
    """Error of one penalty: its slope in δ, at most e^δ + 1, times the error of δ."""
    return (slope + 1) * (2 * logp_error + tolerance.eps(torch.float32))


def check_against_oracle(spec: LossSpec, backend: str) -> None:
    """One call: loss, metrics, worst view, both gradients under a random upstream gradient."""
    case = spec.make_logp()
    mine = on_leaves(case)
    got = call(mine, backend)
    upstream = torch.randn((), generator=strategies.generator(spec.seed + 1))
    if got.loss.requires_grad:
        (upstream * got.loss).backward()

    chosen = got.worst_view if spec.k else None
    theirs, plain = on_leaves(case), on_leaves(case)
    want, eager = expect(theirs, worst_view=chosen), expect(plain, worst_view=chosen, dtype=torch.float32)
    # Rounding of a log-ratio of this size, once in the difference and once in its exponential.
    noise = tolerance.eps(torch.float32) * max(want.reach, 1.0)
    require_clear_of_kinks(want, noise)

    check_choice(got.worst_view, want, eager, penalty_noise(want, noise, math.exp(want.reach)), spec.config.worst_over)
    leaves, plain_leaves = [theirs[n] for n in LOGPS], [plain[n] for n in LOGPS]
    assert got.metrics.keys() == METRICS
    for metric, part in SCALARS.items():
        value = want.loss if part is None else want.scalar(part)
        assert got.metrics[metric].shape == () and not got.metrics[metric].requires_grad
        if metric == "pg_loss" and spec.config.ref_coef:
            continue  # whether the reference's share is inside is a matter of naming
        terms = torch.cat(list(want.terms.values())) if part is None else want.terms[part]
        spread = tolerance.scalar_noise(terms, slopes(value, leaves, retain_graph=True), noise)
        rough = eager.loss if part is None else eager.scalar(part)
        results = [got.metrics[metric]] + ([got.loss] if part is None else [])
        for result in results:
            tolerance.check(metric, result, value, rough, dtype=torch.float32, noise=spread)

    rate = slopes(want.loss, leaves, create_graph=True, retain_graph=True)
    curve = slopes(sum(g.sum() for g in rate), leaves)
    rough = slopes(eager.loss, plain_leaves)
    masked = ~case["mask"]
    for name, g, h, e in zip(LOGPS, rate, curve, rough, strict=True):
        grad = mine[name].grad
        if grad is None:  # nothing depends on it
            assert not bool(g.any()), name
            continue
        assert bool((grad[..., masked] == 0).all()), f"d{name} on masked positions"
        # h is the slope's own slope: an error of the log-ratio moves the gradient by as much
        spread = (2 * noise * h.abs() + tolerance.eps(torch.float32) * g.abs()) * float(upstream.abs())
        tolerance.check(f"d{name}", grad, upstream * g, upstream * e, dtype=torch.float32, noise=spread)

    for name in LOGPS:
        result, given_ = getattr(got, name), case[name]
        assert not result.requires_grad and result.dtype == torch.float32 and result.shape == given_.shape
        assert torch.equal(result, given_.masked_fill(masked, 0.0)), f"{name} is handed back, 0 where masked"


@given(spec=loss_specs())
@example(spec=LossSpec(difficulty="views_identical", k=4, config=RomaConfig(worst_over="token")))
@example(spec=LossSpec(difficulty="nan_when_masked", packed=True, token_advantages=True))
@example(spec=LossSpec(difficulty="row_all_masked", packed=True))
@example(spec=LossSpec(difficulty="far_ratios", config=RomaConfig(penalty_ratio="clean/view")))
def test_values_and_gradients(spec: LossSpec, backend: str) -> None:
    """Every option, padded and packed, under every difficulty."""
    check_against_oracle(spec, backend)


@pytest.mark.parametrize("difficulty", strategies.LOSS_DIFFICULTIES)
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
@pytest.mark.parametrize("penalty_ratio", ["view/clean", "clean/view"])
def test_penalty_options(difficulty: str, worst_over: str, penalty_ratio: str, backend: str) -> None:
    """The whole grid of the penalty's options, so that none depends on what Hypothesis happens to draw."""
    config = RomaConfig(worst_over=worst_over, penalty_ratio=penalty_ratio, lambda_inv=2.0)
    for seed, penalty_over in enumerate(["all", "correct"]):
        spec = LossSpec(b=5, t=7, k=3, seed=seed, difficulty=difficulty, config=replace(config, penalty_over=penalty_over))
        check_against_oracle(spec, backend)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aux_old", ["clean", "view"])
@pytest.mark.parametrize("difficulty", ["plain", "at_clip_edge", "far_ratios", "row_all_masked"])
def test_surrogate_options(
    aggregation: str, dual_clip: float | None, aux_old: str, difficulty: str, backend: str
) -> None:
    """The whole grid of the clipped losses' options."""
    config = RomaConfig(
        aggregation=aggregation, dual_clip=dual_clip, aux_old=aux_old, ref_coef=0.1, max_length=11, lambda_inv=0.5
    )
    for seed, totals in enumerate(["own", "number", "tensor"]):
        spec = LossSpec(b=5, t=7, seed=seed, difficulty=difficulty, totals=totals, config=config)
        check_against_oracle(spec, backend)


@pytest.mark.parametrize("lambda_aux", [0.0, 1.0])
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
def test_gradcheck_reference(worst_over: str, lambda_aux: float) -> None:
    """Finite differences in float64: by view_logp in full, by logp without the penalty (its clean side is a constant)."""
    config = RomaConfig(worst_over=worst_over, lambda_aux=lambda_aux, dual_clip=1.5)
    spec = LossSpec(b=3, t=4, k=3, config=config)
    case = spec.make_logp(torch.float64)

    def by_view(view_logp: Tensor) -> Tensor:
        return call(case | {"view_logp": view_logp}, "reference").loss

    def by_logp(logp: Tensor) -> Tensor:
        return call(case | {"logp": logp, "config": replace(config, lambda_inv=0.0)}, "reference").loss

    assert torch.autograd.gradcheck(by_view, (case["view_logp"].clone().requires_grad_(),))
    assert torch.autograd.gradcheck(by_logp, (case["logp"].clone().requires_grad_(),))


@given(spec=loss_specs())
def test_float64_reference(spec: LossSpec) -> None:
    """In float64 the reference is the oracle to float64's rounding."""
    case = spec.make_logp(torch.float64)
    mine, theirs = on_leaves(case), on_leaves(case)
    got = call(mine, "reference")
    want = expect(theirs, worst_view=got.worst_view if spec.k else None)
    unit = tolerance.eps(torch.float64) * max(want.reach, 1.0)
    require_clear_of_kinks(want, unit)
    for result, value in ((got.loss, want.loss), (got.metrics["roma_penalty_worst"], want.scalar("inv"))):
        assert result.dtype == torch.float64
        size = float(torch.cat(list(want.terms.values())).detach().abs().sum())
        assert abs(float(result.detach() - value.detach())) <= 100 * unit * (1 + size)
    if got.loss.requires_grad:
        got.loss.backward()
    for name, g in zip(LOGPS, slopes(want.loss, [theirs[n] for n in LOGPS]), strict=True):
        if mine[name].grad is not None:
            assert float((mine[name].grad - g).abs().sum()) <= 100 * unit * (1 + float(g.abs().sum()))


def test_result_types(backend: str) -> None:
    """The loss alone is differentiable; all else is detached."""
    case = on_leaves(LossSpec().make_logp())
    got = call(case, backend)
    assert got.loss.shape == () and got.loss.dtype == torch.float32 and got.loss.requires_grad
    assert got.metrics.keys() == METRICS == set(roma.METRICS)
    for name, value in got.metrics.items():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad, name
        assert bool(torch.isfinite(value)), name
    assert torch.equal(got.metrics["loss"], got.loss.detach())


def test_default_config_is_romaconfig(backend: str) -> None:
    """Leaving config out means RomaConfig(), and its defaults are the contract's."""
    case = LossSpec(aux=True).make_logp()
    with_default = call({k: v for k, v in case.items() if k != "config"}, backend)
    assert torch.equal(with_default.loss, call(case | {"config": RomaConfig()}, backend).loss)
    defaults = RomaConfig()
    assert (defaults.lambda_inv, defaults.lambda_aux, defaults.log_ratio_clamp) == (1.0, 0.5, 20.0)
    assert (defaults.clip_low, defaults.clip_high, defaults.dual_clip, defaults.ref_coef) == (0.2, 0.3, 3.0, 0.0)
    assert (defaults.penalty_ratio, defaults.worst_over, defaults.penalty_over) == ("view/clean", "sequence", "all")
    assert (defaults.main, defaults.aggregation, defaults.aux_old) == ("grpo", "grpo", "clean")
    assert (defaults.temperature, defaults.softcap, defaults.max_length) == (1.0, None, None)


def test_constants_are_not_differentiated(backend: str) -> None:
    """Old, reference and view-old log-probs and advantages get no gradient even if they ask for one."""
    config = RomaConfig(ref_coef=0.1, aux_old="view")
    case = on_leaves(LossSpec(config=config).make_logp())
    constants = ("old_logp", "ref_logp", "view_old_logp", "advantages")
    for name in constants:
        case[name] = case[name].clone().requires_grad_()
    call(case, backend).loss.backward()
    for name in constants:
        grad = case[name].grad
        assert grad is None or not bool(grad.any()), name


def test_clean_side_of_the_penalty_is_a_constant(backend: str) -> None:
    """Stop-gradient: the penalty alone gives the clean log-probs no gradient."""
    config = RomaConfig(main=None, lambda_aux=0.0)
    case = on_leaves(LossSpec(b=5, difficulty="all_right", config=config).make_logp())
    call(case, backend).loss.backward()
    assert case["logp"].grad is None or not bool(case["logp"].grad.any())
    assert bool(case["view_logp"].grad.any())


# ---- worked by hand ---------------------------------------------------------------------------------------------------


def tiny(logp: list[float], views: list[list[float]], **others: Any) -> dict[str, Any]:
    """One right sequence whose old log-probs are its own, so that its ratio is 1."""
    clean = torch.tensor([logp])
    case = {
        "logp": clean,
        "view_logp": torch.tensor(views)[:, None],
        "mask": torch.ones(1, len(logp), dtype=torch.bool),
        "advantages": torch.tensor([1.0]),
        "correct": torch.tensor([True]),
        "old_logp": clean.clone(),
    }
    return case | others


def test_penalty_by_hand(backend: str) -> None:
    """δ = ln 2 for one of two tokens: d = 2 − 1 − ln 2, its mean is half of it, ∂/∂a = (r − 1)/2."""
    case = on_leaves(tiny([-1.0, -1.0], [[-1.0 + math.log(2), -1.0]], config=RomaConfig(main=None)))
    got = call(case, backend)
    got.loss.backward()
    half = (1 - math.log(2)) / 2
    slack = 4 * tolerance.eps(torch.float32)
    assert abs(float(got.loss.detach()) - half) <= slack
    assert abs(float(case["view_logp"].grad[0, 0, 0]) - 0.5) <= slack
    assert float(case["view_logp"].grad[0, 0, 1]) == 0.0


def test_ratio_direction_by_hand(backend: str) -> None:
    """clean/view: δ = −ln 2, d = 1/2 − 1 + ln 2; ∂/∂a = 1 − r = 1/2."""
    config = RomaConfig(main=None, penalty_ratio="clean/view")
    case = on_leaves(tiny([-1.0], [[-1.0 + math.log(2)]], config=config))
    got = call(case, backend)
    got.loss.backward()
    slack = 4 * tolerance.eps(torch.float32)
    assert abs(float(got.loss.detach()) - (math.log(2) - 0.5)) <= slack
    assert abs(float(case["view_logp"].grad) - 0.5) <= slack


@pytest.mark.parametrize(("delta", "slope"), [(2.0, math.e**2 - 1), (2.25, 0.0), (-2.0, math.e**-2 - 1), (-2.25, 0.0)])
def test_clamp_boundary_by_hand(delta: float, slope: float, backend: str) -> None:
    """At the clamp the gradient still passes, beyond it is 0, and the value stays."""
    config = RomaConfig(main=None, log_ratio_clamp=2.0)
    case = on_leaves(tiny([-4.0], [[-4.0 + delta]], config=config))
    got = call(case, backend)
    got.loss.backward()
    edge = math.copysign(2.0, delta)
    unit = tolerance.SIGMAS * tolerance.eps(torch.float32)
    assert abs(float(got.loss.detach()) - (math.expm1(edge) - edge)) <= unit * math.exp(2)
    assert abs(float(case["view_logp"].grad) - slope) <= unit * math.exp(2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: −rA, slope −rA
        (1.5, 2.0, -2.6, 0.0),  # above 1.3 with A > 0: cut
        (0.5, 2.0, -1.0, -1.0),  # below 0.8 with A > 0: not cut
        (0.5, -2.0, 1.6, 0.0),  # below 0.8 with A < 0: cut
        (1.5, -2.0, 3.0, 3.0),  # above with A < 0: not cut
        (4.0, -2.0, 6.0, 0.0),  # dual clip at 3·|A|
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(ratio: float, advantage: float, loss: float, slope: float, backend: str) -> None:
    """Section 3 at ratios clear of every edge."""
    config = RomaConfig(lambda_inv=0.0)
    case = tiny([-2.0], [[-2.0]], advantages=torch.tensor([advantage]), config=config)
    case = on_leaves(case | {"old_logp": torch.tensor([[-2.0 - math.log(ratio)]])})
    got = call(case, backend)
    got.loss.backward()
    slack = 16 * tolerance.eps(torch.float32) * max(1.0, abs(loss))
    assert abs(float(got.loss.detach()) - loss) <= slack
    assert abs(float(case["logp"].grad) - slope) <= slack


def test_dual_clip_can_be_off(backend: str) -> None:
    """dual_clip=None: ratio 4 with A = −2 costs 8."""
    config = RomaConfig(lambda_inv=0.0, dual_clip=None)
    case = tiny([-2.0], [[-2.0]], advantages=torch.tensor([-2.0]), config=config)
    got = call(case | {"old_logp": torch.tensor([[-2.0 - math.log(4)]])}, backend)
    assert abs(float(got.loss) - 8.0) <= 8 * 16 * tolerance.eps(torch.float32)


def test_reference_kl_by_hand(backend: str) -> None:
    """β·(expm1(x) − x) with x = ref − logp = ln 2, on top of −A."""
    config = RomaConfig(lambda_inv=0.0, ref_coef=0.5)
    case = tiny([-2.0], [[-2.0]], ref_logp=torch.tensor([[-2.0 + math.log(2)]]), config=config)
    case = on_leaves(case)
    got = call(case, backend)
    got.loss.backward()
    slack = 16 * tolerance.eps(torch.float32)
    assert abs(float(got.loss.detach()) - (-1 + 0.5 * (1 - math.log(2)))) <= slack
    assert abs(float(case["logp"].grad) - (-1 + 0.5 * (1 - 2))) <= slack


def test_mean_over_views_by_hand(backend: str) -> None:
    """worst_over="mean": the mean of both penalties; both views get a gradient; worst_view is still the argmax."""
    two, half = math.log(2), -math.log(2)
    config = RomaConfig(main=None, worst_over="mean")
    case = on_leaves(tiny([-3.0], [[-3.0 + half], [-3.0 + two]], config=config))
    got = call(case, backend)
    got.loss.backward()
    slack = 16 * tolerance.eps(torch.float32)
    assert abs(float(got.loss.detach()) - ((0.5 - 1 + two) + (2 - 1 - two)) / 2) <= slack
    assert torch.allclose(case["view_logp"].grad.reshape(-1), torch.tensor([-0.25, 0.5]), atol=slack)
    assert got.worst_view.tolist() == [1]


@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch"])
@pytest.mark.parametrize("views", [1, 2, 5])
def test_ties_go_to_the_lowest_index(worst_over: str, views: int, backend: str) -> None:
    """Identical views: index 0 wins everywhere and alone has a gradient."""
    config = RomaConfig(main=None, worst_over=worst_over)
    spec = LossSpec(b=4, t=6, k=views, difficulty="views_identical", config=config, aux=False)
    case = on_leaves(spec.make_logp() | {"correct": torch.ones(4, dtype=torch.bool)})
    got = call(case, backend)
    got.loss.backward()
    expected = torch.zeros_like(got.worst_view)
    if worst_over == "token":
        expected[~case["mask"]] = -1
    assert torch.equal(got.worst_view, expected)
    assert bool(case["view_logp"].grad[0].any()) and not bool(case["view_logp"].grad[1:].any())


def test_empty_sequence_has_no_penalty_and_counts(backend: str) -> None:
    """A sequence without counted tokens: worst view 0, no loss, no gradient; the denominator keeps it."""
    case = tiny([-1.0, -1.0], [[-1.5, -2.0], [-3.0, -1.0]], config=RomaConfig())
    alone = call(case, backend)
    both = {name: torch.cat([x, x], dim=1 if name == "view_logp" else 0) for name, x in case.items() if name != "config"}
    both["mask"] = torch.tensor([[False, False], [True, True]])
    got = call(both | {"config": RomaConfig()}, backend)
    assert got.worst_view.tolist() == [0, 1] and alone.worst_view.tolist() == [1]
    assert abs(float(got.loss - alone.loss / 2)) <= 4 * tolerance.eps(torch.float32)


@given(spec=loss_specs(difficulty="everything_masked"))
def test_nothing_counted_gives_zero(spec: LossSpec, backend: str) -> None:
    """No counted token anywhere: the loss and all gradients are exactly 0, never NaN."""
    case = on_leaves(spec.make_logp())
    got = call(case, backend)
    assert float(got.loss.detach()) == 0.0
    if got.loss.requires_grad:
        got.loss.backward()
    for name in LOGPS:
        grad = case[name].grad
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name
    assert all(bool(torch.isfinite(value)) for value in got.metrics.values())


def test_no_views(backend: str) -> None:
    """K = 0 with λ_inv = 0 is plain GRPO, whether views are None or empty."""
    config = RomaConfig(lambda_inv=0.0)
    case = LossSpec(k=0, config=config).make_logp()
    empty, absent = call(case, backend), call(case | {"view_logp": None}, backend)
    some = call(LossSpec(k=2, aux=False, config=config).make_logp() | {n: case[n] for n in case if n != "view_logp"}, backend)
    assert torch.equal(empty.loss, absent.loss) and torch.equal(empty.loss, some.loss)
    assert absent.view_logp.shape == (0, *case["logp"].shape)
    assert empty.metrics.keys() == METRICS


# ---- properties -------------------------------------------------------------------------------------------------------


def same(first: dict[str, Any], second: dict[str, Any], backend: str, spec: LossSpec, *, factor: float = 1.0):
    """Assert loss(second) = factor·loss(first) to rounding of the token terms, and hand back both results."""
    a, b = call(first, backend), call(second, backend)
    want = expect(first)
    size = float(torch.cat(list(want.terms.values())).detach().abs().sum()) * (1 + spec.config.lambda_inv)
    slack = tolerance.SIGMAS * tolerance.eps(torch.float32) * max(want.reach, 1.0) * size * max(factor, 1.0)
    assert abs(float(b.loss.detach()) - factor * float(a.loss.detach())) <= slack
    return a, b


def take(case: dict[str, Any], order: Tensor, *, names: set[str] | None = None) -> dict[str, Any]:
    """A padded case with its sequences in another order, or only some of them."""
    rows = ("logp", "mask", "old_logp", "ref_logp", "view_old_logp", "advantages", "correct", "aux_view")
    out = dict(case)
    for name in rows:
        if case[name] is not None:
            out[name] = case[name][order]
    out["view_logp"] = case["view_logp"][:, order]
    return out


@given(spec=loss_specs(packed=False))
def test_order_of_rollouts_is_free(spec: LossSpec, backend: str) -> None:
    """Permuting sequences permutes the choices and leaves the loss."""
    case = spec.make_logp()
    order = torch.randperm(spec.b, generator=strategies.generator(spec.seed))
    a, b = same(case, take(case, order), backend, spec)
    if spec.config.worst_over != "batch" and spec.k:
        assert torch.equal(a.worst_view[order], b.worst_view)


@given(spec=loss_specs(b=3, t=7, k=4, difficulty="plain", packed=False))
def test_order_of_views_is_free(spec: LossSpec, backend: str) -> None:
    """Permuting views permutes the choices (no ties here) and leaves the loss."""
    case = spec.make_logp()
    # Short sequences may tie exactly at 0 where everything is clamped: far from it under this difficulty.
    order = torch.randperm(4, generator=strategies.generator(spec.seed))
    back = torch.argsort(order)
    aux = None if case["aux_view"] is None else back[case["aux_view"]]
    permuted = case | {"view_logp": case["view_logp"][order], "aux_view": aux}
    a, b = same(case, permuted, backend, spec)
    assume(spec.config.log_ratio_clamp > 2.0 and (spec.config.worst_over != "batch" or bool(case["correct"].any())))
    counted = b.worst_view >= 0
    assert torch.equal(a.worst_view[counted], order[b.worst_view[counted]])


@given(spec=loss_specs(packed=False))
def test_appending_masked_tokens_changes_nothing(spec: LossSpec, backend: str) -> None:
    """Three more columns of garbage under a False mask."""
    case = spec.make_logp()
    longer = dict(case)
    for name in ("logp", "old_logp", "ref_logp", "view_old_logp", "view_logp", "mask", "advantages"):
        x = case[name]
        if x is None or (name == "advantages" and not spec.token_advantages):
            continue
        junk = torch.full((*x.shape[:-1], 3), float("nan")) if x.is_floating_point() else x.new_zeros(*x.shape[:-1], 3)
        longer[name] = torch.cat([x, junk], dim=-1)
    a, b = same(case, longer, backend, spec)
    if spec.config.worst_over == "token":
        assert torch.equal(b.worst_view, torch.nn.functional.pad(a.worst_view, (0, 3), value=-1))
    else:
        assert torch.equal(a.worst_view, b.worst_view)


@given(spec=loss_specs(packed=False))
def test_packed_equals_padded(spec: LossSpec, backend: str) -> None:
    """The same sequences in both forms: same loss, same gradients, same choices."""
    padded = on_leaves(spec.make_logp())
    packed = on_leaves(replace(spec, packed=True).make_logp())
    a, b = same(padded, packed, backend, spec)
    if spec.config.worst_over != "token":
        assert torch.equal(a.worst_view, b.worst_view)
    if not a.loss.requires_grad:
        return
    a.loss.backward()
    b.loss.backward()
    for name in LOGPS:
        first, second = padded[name].grad, packed[name].grad
        if first is None:
            assert second is None or not bool(second.any())
            continue
        left, right = first[..., padded["mask"]], second[..., packed["mask"]]
        slack = 8 * tolerance.eps(torch.float32) * float(left.abs().amax()) if left.numel() else 0.0
        assert bool(((left - right).abs() <= slack).all()), name


@given(spec=loss_specs(config=configs(ref_coef=0.0, lambda_inv=0.0)))
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_loss_scales_with_advantages(factor: float, spec: LossSpec, backend: str) -> None:
    """Both surrogates are homogeneous in A, clips and dual clip included (a power of two, so bit for bit)."""
    case = spec.make_logp()
    a, b = call(case, backend), call(case | {"advantages": factor * case["advantages"]}, backend)
    assert torch.equal(b.loss, factor * a.loss)


@given(spec=loss_specs(k=1, config=configs(lambda_inv=1.0)))
def test_one_view_is_the_plain_penalty(spec: LossSpec, backend: str) -> None:
    """With K = 1 all four ways of choosing agree."""
    case = spec.make_logp()
    for worst_over in ("sequence", "token", "batch", "mean"):
        same(case, case | {"config": replace(spec.config, worst_over=worst_over)}, backend, spec)


@given(spec=loss_specs(b=5, packed=False, config=configs(worst_over="sequence") | configs(worst_over="token")))
def test_shards_add_up(spec: LossSpec, backend: str) -> None:
    """Losses and gradients of micro-batches under global counts sum to the whole batch's."""
    case = on_leaves(spec.make_logp())
    whole = call(case, backend)
    counts = {
        "total_sequences": case.get("total_sequences", 5),
        "total_tokens": case.get("total_tokens", int(case["mask"].sum())),
        "total_correct": case.get("total_correct", int(case["correct"].sum())),
    }
    parts = on_leaves(spec.make_logp())
    losses = [call(take(parts, rows) | counts, backend).loss for rows in torch.tensor([0, 1, 2, 3, 4]).split([2, 1, 2])]
    want = expect(case)
    size = float(torch.cat(list(want.terms.values())).detach().abs().sum()) * (1 + spec.config.lambda_inv)
    slack = tolerance.SIGMAS * tolerance.eps(torch.float32) * max(want.reach, 1.0) * size
    assert abs(float(sum(losses).detach()) - float(whole.loss.detach())) <= slack
    if whole.loss.requires_grad:
        whole.loss.backward()
        sum(losses).backward()
        for name in LOGPS:
            first, second = case[name].grad, parts[name].grad
            if first is None:
                continue
            second = torch.zeros_like(first) if second is None else second
            close = tolerance.SIGMAS * tolerance.eps(torch.float32) * float(first.abs().sum())
            assert bool(((first - second).abs() <= close).all()), name


@given(spec=loss_specs())
def test_same_input_twice_is_bitwise_equal(spec: LossSpec, backend: str) -> None:
    """Two runs agree to the last bit."""
    runs = []
    for _ in range(2):
        case = on_leaves(spec.make_logp())
        got = call(case, backend)
        if got.loss.requires_grad:
            got.loss.backward()
        runs.append([got.loss.detach(), got.worst_view, *got.metrics.values(), case["logp"].grad, case["view_logp"].grad])
    for first, second in zip(*runs, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@given(spec=loss_specs())
def test_back_ends_agree_on_metrics(spec: LossSpec) -> None:
    """Metrics never change with the back end: same keys, same values to rounding, the unnamed ones too."""
    case = spec.make_logp()
    noise = tolerance.eps(torch.float32)
    want = expect(case)
    require_clear_of_kinks(want, noise * max(want.reach, 1.0))
    reference = call(case, "reference").metrics
    got = call(case, "torch").metrics
    assert got.keys() == reference.keys()
    size = 1 + math.exp(want.reach) * float(case["mask"].sum())
    for name, value in got.items():
        assert abs(float(value - reference[name])) <= 16 * noise * size, name


def test_memory_layout_does_not_matter(backend: str) -> None:
    """Non-contiguous and expanded inputs give the same bits."""
    case = LossSpec(b=4, t=6, k=3, config=RomaConfig(ref_coef=0.1)).make_logp()
    odd = dict(case)
    for name in ("logp", "old_logp", "ref_logp", "mask"):
        odd[name] = case[name].t().contiguous().t()
    odd["view_logp"] = case["view_logp"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    a, b = call(on_leaves(case), backend), call(odd, backend)
    assert torch.equal(a.loss.detach(), b.loss) and torch.equal(a.worst_view, b.worst_view)


# ---- the comparator bites ---------------------------------------------------------------------------------------------

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
    theirs = on_leaves(case)
    want, eager = expect(theirs), expect(case, dtype=torch.float32)
    noise = tolerance.eps(torch.float32) * max(want.reach, 1.0)
    terms = torch.cat(list(want.terms.values()))
    spread = tolerance.scalar_noise(terms, slopes(want.loss, [theirs[n] for n in LOGPS]), noise)
    wrong = expect(case | MUTANTS[mutant](case)).loss.detach()
    limit = tolerance.bound(want.loss, eager.loss, torch.float32, spread)
    assert abs(float(wrong - want.loss.detach())) > tolerance.PLANTED * limit.largest
    assert tolerance.refuses("loss", wrong.float(), want.loss, eager.loss, dtype=torch.float32, noise=spread)
