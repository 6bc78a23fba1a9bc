"""The two terms that look at views, against docs/MATH.md section 2 in float64; their metrics."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from roma.integrations.options import RomaOptions
from roma.integrations.terms import (
    Totals,
    by_corruption,
    corruption_metrics,
    metrics_of,
    pairs_of,
    view_terms,
)
from roma.testing.tolerance import PLANTED, few

NAMES = ("jpeg", "blur", "noise")
DIFFICULTIES = (
    "plain",
    "nothing_right",
    "no_advantage",
    "row_all_masked",
    "views_identical",
    "rows_of_text",
    "far_apart",
)


@dataclass
class Batch:
    """A micro-batch as a trainer has it, log-probs in fp32."""

    logp: Tensor  # [B, T]
    view_logp: Tensor  # [K, B, T]
    old: Tensor | None
    mask: Tensor
    advantages: Tensor  # [B]
    weight: Tensor | None  # [B, T]
    correct: Tensor
    aux_view: Tensor
    has_views: Tensor

    def rows(self, index: list[int]) -> Batch:
        """Some of them."""
        picked = {
            name: None if x is None else x[:, index] if name == "view_logp" else x[index]
            for name, x in vars(self).items()
        }
        return Batch(**picked)


def drawn(seed: int, difficulty: str, views: int, off_policy: bool, weighted: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    b, t = 5, 4
    far = 4.0 if difficulty == "far_apart" else 0.4
    logp = -3 * torch.rand(b, t, generator=generator)
    apart = 0.0 if difficulty == "views_identical" else far
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=generator)
    correct = torch.rand(b, generator=generator) < 0.6
    has_views = torch.ones(b, dtype=torch.bool)
    advantages = normal(b)
    if difficulty == "row_all_masked":
        mask[0], correct[0] = False, True
    if difficulty == "rows_of_text":
        has_views[::2] = False
    return Batch(
        logp,
        logp + apart * normal(views, b, t),
        logp + far / 2 * normal(b, t) if off_policy else None,
        mask,
        advantages * (difficulty != "no_advantage"),
        0.5 + torch.rand(b, t, generator=generator) if weighted else None,
        correct & (difficulty != "nothing_right"),
        torch.randint(views, (b,), generator=generator),
        has_views,
    )


def formula(batch: Batch, views: Tensor, config, totals: Totals, plant: str = "") -> Tensor:
    """λ_aux·L_aux + λ_inv·L_inv, in the dtype of views [K, B, T]; loops over rows."""
    logp = batch.logp.to(views)
    old = logp if batch.old is None else batch.old.to(views)
    auxiliary, penalties = [], []
    for i, counted in enumerate(batch.mask):
        n = max(int(counted.sum()), 1)
        if not batch.has_views[i]:
            penalties.append([views[k, i, :0].sum() for k in range(len(views))])
            continue
        gain = batch.advantages[i].to(views).expand(len(counted))
        if batch.weight is not None and plant != "weight":
            gain = gain * batch.weight[i].to(views)
        j = int(batch.aux_view[i]) - (plant == "aux view")
        rho = (views[j, i] - old[i]).clamp(-20, 20).exp()
        loss = -torch.minimum(
            rho * gain, rho.clamp(1 - config.clip_low, 1 + config.clip_high) * gain
        )
        if config.dual_clip is not None:
            loss = torch.where(gain < 0, loss.minimum(-config.dual_clip * gain), loss)
        per = {"grpo": n * totals.sequences, "dapo": max(totals.tokens, 1)}.get(
            config.aggregation, totals.sequences * (config.max_length or 0)
        )
        auxiliary.append(loss[counted].sum() / per)
        delta = views[:, i] - logp[i]
        delta = delta if (config.penalty_ratio == "view/clean") != (plant == "k3") else -delta
        d = (torch.expm1(delta.clamp(-20, 20)) - delta.clamp(-20, 20))[:, counted]
        d = d * (batch.correct[i] or plant == "right")
        penalties.append(list(d.sum(1) / n))
        if config.worst_over == "token":
            penalties[-1] = [d.max(0).values.sum() / n] * len(views)
    table = torch.stack([torch.stack(own) for own in penalties])  # [B, K]
    if config.worst_over == "mean":
        worst = table.mean(1).sum()
    elif config.worst_over == "batch":
        worst = table.sum(0).max()
    else:
        worst = table.max(1).values.sum()
    over = totals.sequences if config.penalty_over == "all" else max(totals.correct, 1)
    zero = views.sum() * 0
    return config.lambda_aux * sum(auxiliary, zero) + config.lambda_inv * worst / over + zero


def terms(batch: Batch, options, config, totals, *, lean=True, pair_logp=None):
    pairs = pairs_of(
        batch.correct, batch.aux_view, batch.advantages, batch.has_views, options, lean=lean
    )
    picked = [batch.view_logp[k, b] for k, b in pairs]
    leaf = torch.stack(picked) if picked else torch.zeros(0, batch.logp.shape[1])
    leaf = leaf.clone().requires_grad_()
    out = view_terms(
        batch.logp,
        leaf,
        pairs,
        mask=batch.mask.int(),
        advantages=batch.advantages,
        correct=batch.correct,
        aux_view=batch.aux_view,
        has_views=batch.has_views,
        totals=totals,
        config=config,
        num_views=options.num_views,
        old_logp=batch.old,
        weight=batch.weight,
    )
    dense = torch.zeros_like(batch.view_logp)
    if out.loss.requires_grad:
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        for (k, b), own in zip(pairs, gradient, strict=True):
            dense[k, b] = own
    return out, dense, pairs


def bound(batch: Batch, config, totals: Totals) -> float:
    """A gradient is λ·(weight A ρ) + λ·(r − 1) over a denominator; a log-ratio is off by eps|logp|.

    Both exponentials hand that on times themselves; a loss is a sum of B·T of such terms.
    """
    views, old = batch.view_logp, batch.logp if batch.old is None else batch.old
    size = 1 + max(float(x.abs().max()) for x in (batch.logp, views, old))
    ratio = max(float((views - x).abs().max().exp()) for x in (old, batch.logp))
    gain = float(batch.advantages.abs().max()) * (1 if batch.weight is None else 1.5)
    least = min(totals.sequences, max(totals.tokens, 1), max(totals.correct, 1))
    return few((config.lambda_aux * gain + config.lambda_inv) * ratio * size * 5 / least)


cases = given(
    seed=st.integers(0, 2**16),
    difficulty=st.sampled_from(DIFFICULTIES),
    views=st.sampled_from([1, 2, 3]),
    off_policy=st.booleans(),
    weighted=st.booleans(),
    aggregation=st.sampled_from(["grpo", "dapo", "dr_grpo"]),
    penalty_ratio=st.sampled_from(["view/clean", "clean/view"]),
    worst_over=st.sampled_from(["sequence", "token", "batch", "mean"]),
    penalty_over=st.sampled_from(["all", "correct"]),
    dual_clip=st.sampled_from([None, 1.2, 3.0]),
    share=st.sampled_from([0.6, 1.0, 2.5]),
)
# Found by a run whose generation spanned two steps: half of its tokens were fewer than the
# micro-batch's own, and the loss refused the total.
SHARED = {
    "seed": 0,
    "difficulty": "plain",
    "views": 2,
    "off_policy": True,
    "weighted": True,
    "aggregation": "dapo",
    "penalty_ratio": "view/clean",
    "worst_over": "sequence",
    "penalty_over": "correct",
    "dual_clip": 3.0,
    "share": 0.6,
}


def setting(seed, difficulty, views, off_policy, weighted, share, **more):
    batch = drawn(seed, difficulty, views, off_policy, weighted)
    aggregation = more.pop("aggregation")
    options = RomaOptions(num_views=views, lambda_inv=1.7, lambda_aux=0.6, **more)
    config = options.loss_config(aggregation=aggregation, max_length=8, dual_clip=more["dual_clip"])
    right = int((batch.correct & batch.has_views).sum())
    totals = Totals(5 * max(share, 1), int(batch.mask.sum()) * share, right * share)
    return batch, options, config, totals


def wanted(batch, config, totals, plant=""):
    leaf = batch.view_logp.double().requires_grad_()
    loss = formula(batch, leaf, config, totals, plant)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@cases
@example(**SHARED)
def test_value_gradient_and_pairs(**case):
    batch, options, config, totals = setting(**case)
    loss, gradient = wanted(batch, config, totals)
    limit = bound(batch, config, totals)
    for lean in (True, False):
        out, got, pairs = terms(batch, options, config, totals, lean=lean)
        assert abs(float(out.loss.detach()) - float(loss)) <= limit
        assert (got.double() - gradient).abs().max() <= limit
        # Whatever has a gradient was run; and lean runs no row that cannot have one.
        every = {(k, b) for k in range(case["views"]) for b in range(5) if batch.has_views[b]}
        moved = {(int(k), int(b)) for k, b in gradient.abs().sum(2).nonzero()}
        assert moved <= set(pairs) <= every and pairs == sorted(pairs)
        if not lean:
            assert set(pairs) == every
        else:
            for k, b in every - set(pairs):
                assert not batch.correct[b] and not (
                    batch.aux_view[b] == k and batch.advantages[b] != 0
                )
    # The metrics are the terms before their weights.
    by_hand = config.lambda_aux * out.metrics["roma_aux_loss"]
    by_hand = by_hand + config.lambda_inv * out.metrics["roma_penalty_worst"]
    assert abs(float(by_hand) - float(loss)) <= 2 * limit


@pytest.mark.parametrize("plant", ["aux view", "k3", "right", "weight"])
def test_a_planted_error_is_refused(plant):
    batch, _, config, totals = setting(**SHARED)
    right, wrong = wanted(batch, config, totals)[1], wanted(batch, config, totals, plant)[1]
    assert (right - wrong).abs().max() > PLANTED * bound(batch, config, totals)


@pytest.mark.parametrize(
    ("given_options", "kept"),
    [
        ({"lambda_inv": 0.0}, lambda right, drawn: drawn),
        ({"lambda_aux": 0.0}, lambda right, drawn: right),
        ({}, lambda right, drawn: right or drawn),
    ],
)
def test_pairs_of_a_term_that_is_off_are_not_run(given_options, kept):
    correct, aux_view = torch.tensor([True, False, False]), torch.tensor([1, 0, 1])
    advantages = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # by token: one is enough
    pairs = pairs_of(
        correct, aux_view, advantages, torch.ones(3, dtype=torch.bool), RomaOptions(**given_options)
    )
    moved = advantages.ne(0).any(1)
    assert pairs == [
        (k, b)
        for k in range(2)
        for b in range(3)
        if kept(bool(correct[b]), bool(moved[b] and aux_view[b] == k))
    ]


@pytest.mark.parametrize("penalty_over", ["all", "correct"])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_shards_add_up(aggregation, penalty_over):
    case = {**SHARED, "share": 1.0, "aggregation": aggregation, "penalty_over": penalty_over}
    batch, options, config, totals = setting(**case)
    whole, gradient, _ = terms(batch, options, config, totals)
    limit = bound(batch, config, totals)
    parts, loss, metrics, sums = [[0, 1], [2], [3, 4]], 0.0, {}, {}
    for part in parts:
        out, own, pairs = terms(batch.rows(part), options, config, totals)
        assert (own - gradient[:, part]).abs().max() <= 2 * limit
        loss += float(out.loss.detach())
        for name, value in metrics_of(out, shards=len(parts)).items():
            metrics[name] = metrics.get(name, 0.0) + value / len(parts)
        right = batch.correct[part] & batch.has_views[part]
        names = [NAMES[k] for k, _ in pairs]
        for name, value in by_corruption(
            out, batch.mask[part], right, pairs, names, config
        ).items():
            sums[name] = sums.get(name, 0) + value
    assert abs(loss - float(whole.loss.detach())) <= 2 * limit
    expected = metrics_of(whole)
    assert (
        set(metrics)
        == set(expected)
        == {
            "roma/penalty_worst",
            "roma/penalty_mean",
            "roma/aux_loss",
            "roma/aux_clipfrac",
        }
    )
    for name in expected:
        assert metrics[name] == pytest.approx(expected[name], abs=2 * limit)
    # By hand: the mean divergence under each corruption, and how often it was the worst.
    gap = (batch.view_logp - batch.logp).double()
    d = ((torch.expm1(gap) - gap) * batch.mask).sum(2) / batch.mask.sum(1)
    own = d[:, batch.correct]
    assert batch.correct.sum() > 1
    named = corruption_metrics(sums)
    for k in range(2):
        assert named[f"roma/penalty/{NAMES[k]}"] == pytest.approx(float(own[k].mean()), abs=limit)
        share = float((own.argmax(0) == k).double().mean())
        assert named[f"roma/worst_view/{NAMES[k]}"] == pytest.approx(share)
    assert len(named) == 4
