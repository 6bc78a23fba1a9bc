"""Objectives, sampler's weights, entropy bonus and gate: by hand, by cost, by mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings

import roma
from roma import RomaConfig
from roma.testing import check_backend, compare_logp, count_products, tensors, tolerance
from roma.testing.strategies import LossSpec

CISPO = RomaConfig(main="cispo", clip_high=1.2, lambda_inv=0.0)
SAPO = RomaConfig(main="sapo", sapo_temperature=(0.5, 2.0), lambda_inv=0.0)
VESPO = RomaConfig(main="vespo", lambda_inv=0.0)
GSPO = RomaConfig(ratio_level="sequence", lambda_inv=0.0)


def one(ratios: list[float], gain: float, config: RomaConfig, **others: Any) -> dict[str, Any]:
    """One sequence of log-probs −2 whose tokens have these ratios."""
    logp = torch.full((1, len(ratios)), -2.0)
    case = {
        "logp": logp,
        "view_logp": logp[None, :, :].clone(),
        "mask": torch.ones_like(logp, dtype=torch.bool),
        "advantages": torch.tensor([gain]),
        "correct": torch.tensor([True]),
        "old_logp": logp - torch.tensor([ratios]).log(),
        "config": config,
    }
    return compare_logp.on_leaves(case | others)


def outcome(case: dict[str, Any], backend: str) -> tuple[Any, list[float]]:
    """The call's result, and its gradient by logp."""
    got = compare_logp.call(case, backend)
    got.loss.backward()
    return got, case["logp"].grad[0].tolist()


def close(got: list[float], want: list[float]) -> bool:
    """To a dozen roundings."""
    pairs = zip(got, want, strict=True)
    return all(abs(x - y) <= tolerance.few(max(1.0, abs(y))) for x, y in pairs)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def phi(w: float, k: float, rate: float) -> float:
    return math.exp(rate + k * math.log(w) - rate * w)


@pytest.mark.parametrize(
    ("config", "ratios", "gain", "loss", "slopes"),
    [
        # the ratio, at most 1.2, is a constant: −ρA·logp, slope −ρA, above the cap too
        (CISPO, [1.1], 2.0, 4.4, [-2.2]),
        (CISPO, [3.0], 2.0, 4.8, [-2.4]),
        (CISPO, [3.0], -2.0, -4.8, [2.4]),
        # −(4/κ)σ(κ(ρ − 1))A, slope −4σ(1 − σ)ρA; κ = ½ for A > 0, 2 else
        (SAPO, [1.0], 2.0, -8.0, [-2.0]),
        (SAPO, [2.0], 2.0, -16 * sigmoid(0.5), [-16 * sigmoid(0.5) * sigmoid(-0.5)]),
        (SAPO, [2.0], -2.0, 4 * sigmoid(2.0), [16 * sigmoid(2.0) * sigmoid(-2.0)]),
        # w = 2·½·2 for all tokens; φ is a constant
        (VESPO, [2.0, 0.5, 2.0], 1.5, 3 * phi(2, 2, 3), [-0.5 * phi(2, 2, 3)] * 3),
        (VESPO, [2.0, 0.5, 2.0], -1.5, -3 * phi(2, 3, 2), [0.5 * phi(2, 3, 2)] * 3),
        # the geometric mean √(1.5·1.5) = 1.5 of both is clipped; 1.2 is not, and both share a slope
        (GSPO, [1.5, 1.5], 2.0, -2.6, [0.0, 0.0]),
        (GSPO, [1.44, 1.0], 2.0, -2.4, [-1.2, -1.2]),
        (GSPO, [4.0, 4.0], -2.0, 6.0, [0.0, 0.0]),
    ],
)
def test_objectives_by_hand(
    config: RomaConfig, ratios: list[float], gain: float, loss: float, slopes: list[float],
    backend: str,
) -> None:  # fmt: skip
    got, found = outcome(one(ratios, gain, config), backend)
    assert close([float(got.loss.detach()), *found], [loss, *slopes])


def test_the_auxiliary_loss_takes_mains_form(backend: str) -> None:
    """The same numbers on the sampled view, and the log-prob is the view's."""
    for config, ratios in ((CISPO, [3.0]), (SAPO, [2.0]), (VESPO, [2.0, 0.5]), (GSPO, [1.44, 1])):
        alone = one(ratios, 2.0, config)
        want, slopes = outcome(alone, backend)
        case = one(ratios, 2.0, replace(config, main=config.main, lambda_aux=0.5))
        case |= {"aux_view": torch.zeros(1, dtype=torch.int64)}
        got, _ = outcome(case, backend)
        assert float(got.metrics["roma_aux_loss"]) == float(want.metrics["pg_loss"])
        assert close(case["view_logp"].grad[0, 0].tolist(), [x / 2 for x in slopes])


def test_a_weight_multiplies_before_the_kl(backend: str) -> None:
    """−wρA + β·(expm1(ln 2) − ln 2), whose slope is −wρA + β·(1 − 2)."""
    config = RomaConfig(lambda_inv=0.0, ref_coef=0.5)
    ref = torch.tensor([[-2.0 + math.log(2)]])
    for weight in (0.0, 0.25, 2.0):
        case = one([1.0], 1.0, config, ref_logp=ref, rollout_weight=torch.tensor([weight]))
        got, slopes = outcome(case, backend)
        want = [-weight + 0.5 * (1 - math.log(2)), -weight - 0.5]
        assert close([float(got.loss.detach()), *slopes], want)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_unbiased_kl_by_hand(level: Any, backend: str) -> None:
    """k3·ρ with ρ = 2 for both levels, of two equal tokens: d = expm1(x) − x of x = ln 2."""
    config = RomaConfig(lambda_inv=0.0, ref_coef=0.5, ref_unbiased=True, ratio_level=level)
    ref = torch.full((1, 2), -2.0 + math.log(2))
    got, found = outcome(one([2.0, 2.0], 0.0, config, ref_logp=ref), backend)
    d = 1 - math.log(2)
    assert close([float(got.loss.detach()), *found], [d, *[0.5 * (d - 1)] * 2])
    assert close([float(got.metrics["ref_kl"])], [2 * d])


def test_the_entropy_bonus_by_hand(backend: str) -> None:
    """−η·mean H over the counted tokens of all shards; its slope is −η/total_tokens."""
    config = RomaConfig(lambda_inv=0.0, entropy_coef=0.5)
    entropy = torch.tensor([[1.0, 2.0, math.nan]])
    case = one([1.0, 1.0, 1.0], 0.0, config, entropy=entropy)
    case["mask"] = torch.tensor([[True, True, False]])
    got = compare_logp.call(case | {"total_sequences": 2, "total_tokens": 6}, backend)
    got.loss.backward()
    assert close([float(got.loss.detach()), float(got.metrics["entropy"])], [-0.25, 0.5])
    assert close(case["entropy"].grad[0].tolist(), [-0.5 / 6, -0.5 / 6, 0.0])


def gated(backend: str, divergences: list[float], **options: Any) -> tuple[Any, list[bool]]:
    """One right token on views of about these divergences, and which views have a gradient."""
    views = torch.tensor([[[-2.0 + math.sqrt(2 * d)]] for d in divergences])
    config = RomaConfig(main=None, **options)
    case = one([1.0], 0.0, config)
    case["view_logp"] = views.requires_grad_()
    got = compare_logp.call(case, backend)
    got.loss.backward()
    return got, [bool(g) for g in case["view_logp"].grad[:, 0, 0]]


def test_the_gate_by_hand(backend: str) -> None:
    """The largest divergence within the bound is the worst one, whose gradient alone is left."""
    sizes = [0.05, 0.2, 0.01]
    free, alive = gated(backend, sizes)
    assert free.worst_view.tolist() == [1] and alive == [False, True, False]
    assert float(free.metrics["roma_gated"]) == 0
    bound, alive = gated(backend, sizes, gate_bound=0.1)
    assert bound.worst_view.tolist() == [0] and alive == [True, False, False]
    assert close([float(bound.metrics["roma_gated"])], [1 / 3])
    assert close(
        [float(bound.metrics["roma_penalty_mean"])], [float(free.metrics["roma_penalty_mean"])]
    )
    for tensor in (0.001, torch.tensor(0.001)):
        none, alive = gated(backend, sizes, gate_bound=tensor)
        assert none.worst_view.tolist() == [-1] and not any(alive)
        assert float(none.loss.detach()) == 0 and float(none.metrics["roma_gated"]) == 1
    every, _ = gated(backend, sizes, gate_bound=torch.tensor(math.inf))
    assert torch.equal(every.loss, free.loss)


def test_the_weight_of_a_penalty_by_hand(backend: str) -> None:
    """exp(−D/τ) of the worst view, a constant."""
    free, _ = gated(backend, [0.05, 0.2])
    d = float(free.loss.detach())
    weighed, _ = gated(backend, [0.05, 0.2], gate_tau=0.5)
    assert close([float(weighed.loss.detach())], [d * math.exp(-d / 0.5)])
    both, _ = gated(backend, [0.05, 0.2], gate_tau=0.5, gate_bound=0.1)
    d = float(gated(backend, [0.05])[0].loss.detach())
    assert close([float(both.loss.detach())], [d * math.exp(-d / 0.5)])


@pytest.mark.parametrize("main", ["grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_zero_costs_nothing(main: Any, level: Any, kernel: str) -> None:
    """Half of the sequences have weight 0 (vespo: advantage 0): they are not in the backward."""
    if (main, level) == ("vespo", "sequence"):
        return
    b, t, d, v = 16, 16, 16, 512  # half of the sequences: a whole block of rows
    g = tensors.generator(0)
    hidden = torch.randn(b, t, d, generator=g).requires_grad_()
    half = (torch.arange(b) < b // 2).float()
    config = RomaConfig(main=main, ratio_level=level, lambda_inv=0.0, clip_high=9.0, dual_clip=None)
    with count_products() as count:
        roma.roma_loss(
            hidden,
            None,
            torch.randn(v, d, generator=g).requires_grad_(),
            torch.randint(v, (b, t), generator=g),
            mask=torch.ones(b, t, dtype=torch.bool),
            advantages=half if main == "vespo" else torch.ones(b),
            correct=torch.ones(b, dtype=torch.bool),
            rollout_weight=None if main == "vespo" else half,
            config=config,
            backend=kernel,
        ).loss.backward()
    assert b // 2 * t <= count.rows("dhidden", v) <= 1.05 * (b // 2) * t
    assert count.rows("dweight", v) == count.rows("dhidden", v)


def test_weights_of_one_change_nothing(backend: str) -> None:
    """By sequence, by token and not given: the same bits."""
    for config in (RomaConfig(ref_coef=0.1), replace(SAPO, ref_coef=0.1), CISPO):
        spec = LossSpec(b=4, t=6, config=config)
        case, losses = spec.make_logp(), []
        for weight in (None, torch.ones(4), torch.ones(4, 6)):
            losses.append(compare_logp.call(case | {"rollout_weight": weight}, backend).loss)
        assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


# Wrong readings, each of which `check_backend` must refuse.


@pytest.fixture
def unshrunk() -> Iterator[None]:
    """A failing input is reported as found: only that it fails counts here."""
    phases = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
    with mock.patch("roma.testing.backends.settings", lambda **o: settings(**o, phases=phases)):
        yield


def loss(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    return roma.roma_loss_from_logp(logp, views, config=config, backend="torch", **named)


def with_options(**options: Any) -> Callable[..., Any]:
    """The loss with other options."""
    return lambda *x, config, **named: loss(*x, config=replace(config, **options), **named)


def _counts(named: dict[str, Any]) -> Any:
    """Counted tokens of each sequence, [B, 1]."""
    return named["mask"].sum(-1, keepdim=True).clamp(min=1)


def attached(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    """vespo whose φ has a gradient."""
    out = loss(logp, views, config=config, **named)
    mask = named["mask"]
    log_w = torch.where(mask, logp - named["old_logp"], 0).sum(-1, keepdim=True)
    phi = (2 * log_w - 3 * log_w.exp()).exp()
    extra = torch.where(mask, phi * logp.detach(), 0).sum() / mask.sum().clamp(min=1)
    return out._replace(loss=out.loss + (extra - extra.detach()))


def weight_on_the_kl(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    out = loss(logp, views, config=config, **named)
    mask = named["mask"]
    gap = torch.where(mask, named["ref_logp"] - logp, 0)
    off = (gap.expm1() - gap) * (torch.where(mask, named["rollout_weight"], 1) - 1)
    mean = (off / _counts(named)).sum(-1).mean()
    return out._replace(loss=out.loss + config.ref_coef * mean)


def entropy_over_sequences(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    out = loss(logp, views, config=config, **named)
    entropy = torch.where(named["mask"], named["entropy"], 0)
    by_sequence = (entropy / _counts(named)).sum(-1).mean()
    off = by_sequence - entropy.sum() / named["mask"].sum().clamp(min=1)
    return out._replace(loss=out.loss - config.entropy_coef * off)


def gate_after_the_maximum(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    """The worst view of all, and no penalty if that one is out."""
    divergence = roma.view_divergence(logp, views, named["mask"], config=config)
    within = (divergence <= config.gate_bound).all(0)
    named["correct"] = named["correct"] & within
    return loss(logp, views, config=replace(config, gate_bound=None), **named)


def weight_of_the_mean(logp: Any, views: Any, *, config: RomaConfig, **named: Any) -> Any:
    """Weights multiplied after they were averaged over the sequence."""
    mask = named["mask"]
    weight = torch.where(mask, named["rollout_weight"], 0).sum(-1) / _counts(named)[:, 0]
    return loss(logp, views, config=config, **named | {"rollout_weight": weight})


MISTAKES: dict[str, tuple[Callable[..., Any], RomaConfig, dict[str, Any]]] = {
    "κ of the other sign": (with_options(sapo_temperature=(2.0, 0.5)), SAPO, {}),
    "ratio by token": (with_options(ratio_level="token"), GSPO, {}),
    "sapo's ratio by token": (
        with_options(ratio_level="token"), replace(SAPO, ratio_level="sequence"), {},
    ),
    "φ not a constant": (attached, replace(VESPO, aggregation="dapo"), {"difficulty": "plain"}),
    "k and λ of the other sign": (with_options(vespo=(3.0, 2.0, 2.0, 3.0)), VESPO, {}),
    "no cap": (with_options(clip_high=9.0), CISPO, {}),
    "cap at 1 + ε": (with_options(clip_high=2.2), CISPO, {}),
    "weight on the KL": (
        weight_on_the_kl, RomaConfig(lambda_inv=0.0, ref_coef=0.5), {"weights": "token"},
    ),
    "weights averaged": (weight_of_the_mean, RomaConfig(lambda_inv=0.0), {"weights": "token"}),
    "bnpo by the tokens of all shards": (
        with_options(aggregation="dapo"), RomaConfig(aggregation="bnpo"), {"totals": "number"},
    ),
    "luspo by length": (with_options(aggregation="grpo"), RomaConfig(aggregation="luspo"), {}),
    "KL not corrected": (
        with_options(ref_unbiased=False), RomaConfig(ref_coef=0.5, ref_unbiased=True), {},
    ),
    "entropy over sequences": (entropy_over_sequences, RomaConfig(entropy_coef=0.5), {}),
    "gate after the maximum": (gate_after_the_maximum, RomaConfig(gate_bound=0.1), {"k": 4}),
    "no weight of the penalty": (with_options(gate_tau=None), RomaConfig(gate_tau=0.1), {}),
    "weight of another τ": (with_options(gate_tau=0.101), RomaConfig(gate_tau=0.1), {}),
}  # fmt: skip


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_reading_is_refused(mistake: str) -> None:
    """The same calls pass with the right one."""
    wrong, config, fixed = MISTAKES[mistake]
    how = {"op": "roma_loss_from_logp", "dtypes": [torch.float32], "config": config}
    how |= {"difficulty": "plain", "packed": False, "totals": "own", "k": 2, "b": 3, "t": 7}
    how |= {"old": True, "aux": False, "weights": "none", "own": False} | fixed
    check_backend(loss, examples=2, **how)
    with pytest.raises(AssertionError, match=r"^(loss|d?[a-z_]+): "):
        check_backend(wrong, examples=20, **how)
