"""roma_loss_from_logp on cases small enough to work out on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given

from roma import RomaConfig
from roma.testing import compare_logp, tolerance
from roma.testing.strategies import LossSpec, loss_specs


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
    """δ = ln 2 for one of two tokens.

    D = 2 - 1 - ln 2, its mean is half of it, ∂/∂a = (r - 1)/2.
    """
    case = compare_logp.on_leaves(
        tiny([-1.0, -1.0], [[-1.0 + math.log(2), -1.0]], config=RomaConfig(main=None))
    )
    got = compare_logp.call(case, backend)
    got.loss.backward()
    half = (1 - math.log(2)) / 2
    slack = tolerance.few(1.0)
    assert abs(float(got.loss.detach()) - half) <= slack
    assert abs(float(case["view_logp"].grad[0, 0, 0]) - 0.5) <= slack
    assert float(case["view_logp"].grad[0, 0, 1]) == 0.0


def test_ratio_direction_by_hand(backend: str) -> None:
    """clean/view: δ = -ln 2, d = 1/2 - 1 + ln 2; ∂/∂a = 1 - r = 1/2."""
    config = RomaConfig(main=None, penalty_ratio="clean/view")
    case = compare_logp.on_leaves(tiny([-1.0], [[-1.0 + math.log(2)]], config=config))
    got = compare_logp.call(case, backend)
    got.loss.backward()
    slack = tolerance.few(1.0)
    assert abs(float(got.loss.detach()) - (math.log(2) - 0.5)) <= slack
    assert abs(float(case["view_logp"].grad) - 0.5) <= slack


@pytest.mark.parametrize(
    ("delta", "slope"), [(2.0, math.e**2 - 1), (2.25, 0.0), (-2.0, math.e**-2 - 1), (-2.25, 0.0)]
)
def test_clamp_boundary_by_hand(delta: float, slope: float, backend: str) -> None:
    """At the clamp the gradient still passes, beyond it is 0, and the value stays."""
    config = RomaConfig(main=None, log_ratio_clamp=2.0)
    case = compare_logp.on_leaves(tiny([-4.0], [[-4.0 + delta]], config=config))
    got = compare_logp.call(case, backend)
    got.loss.backward()
    edge = math.copysign(2.0, delta)
    unit = tolerance.few(1.0)
    assert abs(float(got.loss.detach()) - (math.expm1(edge) - edge)) <= unit * math.exp(2)
    assert abs(float(case["view_logp"].grad) - slope) <= unit * math.exp(2)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: -rA, slope -rA
        (1.5, 2.0, -2.6, 0.0),  # above 1.3 with A > 0: cut
        (0.5, 2.0, -1.0, -1.0),  # below 0.8 with A > 0: not cut
        (0.5, -2.0, 1.6, 0.0),  # below 0.8 with A < 0: cut
        (1.5, -2.0, 3.0, 3.0),  # above with A < 0: not cut
        (4.0, -2.0, 6.0, 0.0),  # dual clip at 3·|A|
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, backend: str
) -> None:
    """Section 3 at ratios clear of every edge."""
    config = RomaConfig(lambda_inv=0.0)
    case = tiny([-2.0], [[-2.0]], advantages=torch.tensor([advantage]), config=config)
    case = compare_logp.on_leaves(case | {"old_logp": torch.tensor([[-2.0 - math.log(ratio)]])})
    got = compare_logp.call(case, backend)
    got.loss.backward()
    slack = tolerance.few(max(1.0, abs(loss)))
    assert abs(float(got.loss.detach()) - loss) <= slack
    assert abs(float(case["logp"].grad) - slope) <= slack


def test_dual_clip_can_be_off(backend: str) -> None:
    """dual_clip=None: ratio 4 with A = -2 costs 8."""
    config = RomaConfig(lambda_inv=0.0, dual_clip=None)
    case = tiny([-2.0], [[-2.0]], advantages=torch.tensor([-2.0]), config=config)
    got = compare_logp.call(case | {"old_logp": torch.tensor([[-2.0 - math.log(4)]])}, backend)
    assert abs(float(got.loss) - 8.0) <= tolerance.few(8.0)


def test_reference_kl_by_hand(backend: str) -> None:
    """β·(expm1(x) - x) with x = ref - logp = ln 2, on top of -A."""
    config = RomaConfig(lambda_inv=0.0, ref_coef=0.5)
    case = tiny([-2.0], [[-2.0]], ref_logp=torch.tensor([[-2.0 + math.log(2)]]), config=config)
    case = compare_logp.on_leaves(case)
    got = compare_logp.call(case, backend)
    got.loss.backward()
    slack = tolerance.few(1.0)
    assert abs(float(got.loss.detach()) - (-1 + 0.5 * (1 - math.log(2)))) <= slack
    assert abs(float(case["logp"].grad) - (-1 + 0.5 * (1 - 2))) <= slack


def test_mean_over_views_by_hand(backend: str) -> None:
    """worst_over="mean": the mean of both penalties; both views get a gradient.

    worst_view is still the argmax.
    """
    two, half = math.log(2), -math.log(2)
    config = RomaConfig(main=None, worst_over="mean")
    case = compare_logp.on_leaves(tiny([-3.0], [[-3.0 + half], [-3.0 + two]], config=config))
    got = compare_logp.call(case, backend)
    got.loss.backward()
    slack = tolerance.few(1.0)
    assert abs(float(got.loss.detach()) - ((0.5 - 1 + two) + (2 - 1 - two)) / 2) <= slack
    assert torch.allclose(
        case["view_logp"].grad.reshape(-1), torch.tensor([-0.25, 0.5]), atol=slack
    )
    assert got.worst_view.tolist() == [1]


@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch"])
@pytest.mark.parametrize("views", [1, 2, 5])
def test_ties_go_to_the_lowest_index(worst_over: str, views: int, backend: str) -> None:
    """Identical views: index 0 wins everywhere and alone has a gradient."""
    config = RomaConfig(main=None, worst_over=worst_over)
    spec = LossSpec(b=4, t=6, k=views, difficulty="views_identical", config=config, aux=False)
    case = compare_logp.on_leaves(spec.make_logp() | {"correct": torch.ones(4, dtype=torch.bool)})
    got = compare_logp.call(case, backend)
    got.loss.backward()
    expected = torch.zeros_like(got.worst_view)
    if worst_over == "token":
        expected[~case["mask"]] = -1
    assert torch.equal(got.worst_view, expected)
    assert bool(case["view_logp"].grad[0].any()) and not bool(case["view_logp"].grad[1:].any())


def test_empty_sequence_has_no_penalty_and_counts(backend: str) -> None:
    """A sequence without counted tokens: worst view 0, no loss, no gradient.

    The denominator keeps it.
    """
    case = tiny([-1.0, -1.0], [[-1.5, -2.0], [-3.0, -1.0]], config=RomaConfig())
    alone = compare_logp.call(case, backend)
    both = {
        name: torch.cat([x, x], dim=1 if name == "view_logp" else 0)
        for name, x in case.items()
        if name != "config"
    }
    both["mask"] = torch.tensor([[False, False], [True, True]])
    got = compare_logp.call(both | {"config": RomaConfig()}, backend)
    assert got.worst_view.tolist() == [0, 1] and alone.worst_view.tolist() == [1]
    assert abs(float(got.loss - alone.loss / 2)) <= tolerance.few(1.0)


@pytest.mark.parametrize("where", ["logp", "view_logp", "old_logp"])
def test_impossible_token_is_clamped(where: str, backend: str) -> None:
    """A log-prob of -inf on a counted token (a truncating sampler's) acts like -1000: clamped."""
    results = []
    for low in (-1000.0, -math.inf):
        case = compare_logp.on_leaves(tiny([-1.0, -2.0], [[-1.5, -2.5]], config=RomaConfig()))
        with torch.no_grad():
            case[where][..., 1] = low
        got = compare_logp.call(case, backend)
        got.loss.backward()
        results.append([got.loss.detach(), case["logp"].grad, case["view_logp"].grad])
    for first, second in zip(*results, strict=True):
        assert bool(torch.isfinite(second).all()) and torch.equal(first, second)


@pytest.mark.parametrize("b", [0, 2])
def test_no_tokens_at_all(b: int, backend: str) -> None:
    """No sequence, or sequences of length 0 (a rank without work): zero, finite metrics."""
    case = {
        "logp": torch.zeros(b, 0, requires_grad=True),
        "view_logp": torch.zeros(3, b, 0, requires_grad=True),
        "mask": torch.ones(b, 0, dtype=torch.bool),
        "advantages": torch.ones(b),
        "correct": torch.ones(b, dtype=torch.bool),
        "old_logp": torch.zeros(b, 0),
    }
    got = compare_logp.call(case, backend)
    assert float(got.loss.detach()) == 0.0 and got.worst_view.tolist() == [0] * b
    assert all(bool(torch.isfinite(value)) for value in got.metrics.values())


@given(spec=loss_specs(difficulty="everything_masked"))
def test_nothing_counted_gives_zero(spec: LossSpec, backend: str) -> None:
    """No counted token anywhere: the loss and all gradients are exactly 0, never NaN."""
    case = compare_logp.on_leaves(spec.make_logp())
    got = compare_logp.call(case, backend)
    assert float(got.loss.detach()) == 0.0
    if got.loss.requires_grad:
        got.loss.backward()
    for name in compare_logp.LOGPS:
        grad = case[name].grad
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name
    assert all(bool(torch.isfinite(value)) for value in got.metrics.values())


def test_no_views(backend: str) -> None:
    """K = 0 with λ_inv = 0 is plain GRPO, whether views are None or empty."""
    config = RomaConfig(lambda_inv=0.0)
    case = LossSpec(k=0, config=config).make_logp()
    empty, absent = (
        compare_logp.call(case, backend),
        compare_logp.call(case | {"view_logp": None}, backend),
    )
    some = compare_logp.call(
        LossSpec(k=2, aux=False, config=config).make_logp()
        | {n: case[n] for n in case if n != "view_logp"},
        backend,
    )
    assert torch.equal(empty.loss, absent.loss) and torch.equal(empty.loss, some.loss)
    assert absent.view_logp.shape == (0, *case["logp"].shape)
    assert empty.metrics.keys() == compare_logp.METRICS
