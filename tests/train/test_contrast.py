"""PAPO's and DVRP's terms against float64, and the update that has them, in each of its forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import small_model
from support.small_run import config as run_config
from support.update_ranks import CUTS, Cut, batch_of
from torch import Tensor

from roma.models.qwen_vl import Policy
from roma.train.batch import Totals, UpdateBatch
from roma.train.contrast import Contrast, Term
from roma.train.parts import to_learn
from roma.train.scoring import Scorer
from roma.train.trainer import Trainer
from roma.train.update import PolicyLoss
from roma_kernels.roma_loss.config import RomaConfig

PAPO = Contrast((Term("masked", 0, -0.4),), cap=10.0, probability=0.6)
DVRP = Contrast((Term("noised", 0, 0.7), Term("masked", 1, -0.4)), cap=10.0, probability=0.6)
# Of a gradient's norm, in float64: 4e-10 was measured, since the tower's attention rounds to fp32
# and the oracle has two backward passes; each planted error gives over 1e-3.
EXACT = 1e-8
FORMS: dict[str, dict[str, Any]] = {
    "joint, rows": {"update": "joint", "share_prompt": False},
    "joint, shared": {"update": "joint"},
    "lean, rows": {"update": "lean", "share_prompt": False},
    "lean, shared": {"update": "lean"},
}
CUT = Cut(CUTS["micro_batches"].ranks, right=(0, 2, 3), level=(1, 3, 5), empty=(5,))


def of_tokens(
    clean: Tensor,
    views: Tensor,
    mask: Tensor,
    contrast: Contrast,
    config: RomaConfig,
    totals: Totals,
) -> Tensor:
    """MATH.md section 5, rollout after rollout: clean [B, T] has a graph, views [K, B, T] none."""
    loss = clean.new_zeros(())
    for term in contrast.terms:
        for i in range(len(mask)):
            own = mask[i]
            apart = views[term.view, i][own].detach() - clean[i][own]
            inside = apart.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
            d = (torch.exp(inside) - 1 - inside).clamp(max=contrast.cap)
            over = {
                "grpo": totals.sequences * max(int(own.sum()), 1),
                "dapo": totals.tokens,
                "dr_grpo": totals.sequences * (config.max_length or 1),
                "luspo": totals.sequences,
            }[config.aggregation]
            loss = loss + term.coef * d.sum() / over
    return loss


@given(
    seed=st.integers(0, 99),
    sequences=st.sampled_from([1, 2, 5]),
    tokens=st.sampled_from([1, 3, 8]),
    aggregation=st.sampled_from(["grpo", "dapo", "dr_grpo", "luspo"]),
    case=st.sampled_from(["plain", "alike", "far", "above_cap", "row_all_masked"]),
    contrast=st.sampled_from([PAPO, DVRP, replace(DVRP, cap=0.2)]),
)
def test_terms_and_gradients_are_the_formula(
    seed: int, sequences: int, tokens: int, aggregation: str, case: str, contrast: Contrast
) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = -3 * torch.rand(sequences, tokens, generator=generator, dtype=torch.float64)
    size = {"alike": 1e-4, "far": 12.0, "above_cap": 3.0}.get(case, 0.5)
    off = torch.randn(2, sequences, tokens, generator=generator, dtype=torch.float64)
    views, mask = clean + size * off, torch.rand(clean.shape, generator=generator) < 0.8
    if case == "row_all_masked":
        mask[0] = False
    totals = Totals(sequences + 2, int(mask.sum()) + 3, 1)
    config = RomaConfig(aggregation=aggregation, max_length=11)
    for dtype in (torch.float64, torch.float32):
        eps, rounded = torch.finfo(dtype).eps, [x.to(dtype) for x in (clean, views)]
        expected = rounded[0].double().clone().requires_grad_()
        truth = of_tokens(expected, rounded[1].double(), mask, contrast, config, totals)
        truth.backward()
        own = rounded[0][mask].clone().requires_grad_()
        loss, metrics = contrast(own, rounded[1][:, mask], mask.sum(-1), totals, config)
        loss.backward()
        assert metrics.keys() == {f"contrast_{term.name}" for term in contrast.terms}
        # All is float64 up to one rounding of each term, and of each coefficient; exp − 1 of the
        # oracle cancels, by 4 eps of 1. A slope below the cap is under 13; two terms may cancel.
        size = sum(abs(t.coef) * float(metrics[f"contrast_{t.name}"]) for t in contrast.terms)
        assert abs(loss.item() - truth.item()) <= 4 * eps * size + 1e-14
        torch.testing.assert_close(
            own.grad.double(), expected.grad[mask], rtol=4 * eps, atol=4 * eps * 13 + 1e-14
        )


def test_a_view_alike_is_told_from_the_clean_image() -> None:
    """expm1(δ) − δ of fp32 log-probs 1e-4 apart is 5e-9, not what cancels."""
    clean = torch.tensor([-1.0])
    view = clean + 1e-4
    _, metrics = PAPO(clean, view[None], torch.tensor([1]), Totals(1, 1, 1), RomaConfig())
    apart = float(view.double() - clean.double())
    assert float(metrics["contrast_masked"]) == pytest.approx(apart**2 / 2 + apart**3 / 6, rel=1e-6)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return small_model.policy().double()


@pytest.fixture(scope="module")
def batch(policy: Policy) -> UpdateBatch:
    """Six prompts × 3 rollouts, with one, two and no images, one without a token; K = 2."""
    made = batch_of(policy, CUT, 2)
    prompts = replace(made.prompts, pixel_values=made.prompts.pixel_values.double())
    pixels = [pixels.double() for pixels in made.view_pixels]
    old = torch.full(made.mask.shape, -3.7, dtype=torch.float64)
    advantages = made.advantages.double()
    return replace(
        made,
        prompts=prompts,
        view_pixels=pixels,
        old_logp=old,
        advantages=advantages,
        aux_view=None,
    )


def gradients(policy: Policy, loss: Tensor) -> Tensor:
    policy.zero_grad()
    loss.backward()
    every = [w.grad if w.grad is not None else torch.zeros_like(w) for w in policy.parameters()]
    return torch.cat([grad.flatten() for grad in every]).clone()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def of_method(batch: UpdateBatch, contrast: Contrast) -> UpdateBatch:
    return replace(batch, view_pixels=batch.view_pixels[: len(contrast.terms)])


def truth(policy: Policy, config: RomaConfig, batch: UpdateBatch, contrast: Contrast) -> Tensor:
    """The gradient of the clean loss, and of the terms on all logits, a row per rollout."""
    clean = replace(config, lambda_inv=0.0, lambda_aux=0.0)
    out = PolicyLoss(policy, clean, update="joint", share_prompt=False)(
        batch.without_views(), batch.totals()
    )
    main = gradients(policy, out.loss)
    states = Scorer(policy, config, share_prompt=False)._padded(batch)
    rows = [
        torch.log_softmax(hidden @ policy.head_weight.T / config.temperature, -1)
        .gather(-1, batch.tokens[..., None])[..., 0]
        for hidden in states
    ]  # fmt: skip
    views = torch.stack(rows[1:])
    term = of_tokens(rows[0], views, batch.mask, contrast, config, batch.totals())
    return main + gradients(policy, term)


@pytest.mark.parametrize("contrast", [PAPO, DVRP], ids=["papo", "dvrp"])
@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_every_form_has_the_terms(
    policy: Policy, batch: UpdateBatch, contrast: Contrast, aggregation: str
) -> None:
    batch = of_method(batch, contrast)
    config = RomaConfig(aggregation=aggregation, temperature=0.8)
    with small_model.exact_norms():
        expected = truth(policy, config, batch, contrast)
        metrics = None
        for name, form in FORMS.items():
            policy_loss = PolicyLoss(policy, config, contrast=contrast, **form)
            out = policy_loss(batch, batch.totals())
            assert apart(gradients(policy, out.loss), expected) <= EXACT, name
            assert out.metrics["loss"] == out.loss.detach()
            assert not any(key.startswith("roma_") for key in out.metrics)
            assert out.divergence.isnan().all() and out.divergence.shape == (
                len(contrast.terms),
                18,
            )
            assert out.scored == int(batch.mask.sum())
            metrics = metrics or out.metrics
            for key, value in out.metrics.items():
                torch.testing.assert_close(value, metrics[key], rtol=0, atol=1e-12)
        terms = [float(out.metrics[f"contrast_{term.name}"]) for term in contrast.terms]
        assert min(terms) > 1e-4
        added = sum(term.coef * x for term, x in zip(contrast.terms, terms, strict=True))
        assert float(out.metrics["loss"]) == pytest.approx(float(out.metrics["pg_loss"]) + added)


def test_planted_errors_are_found(
    policy: Policy, batch: UpdateBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient on the view's side, the other sign, the other direction, other views."""
    config = RomaConfig()
    with small_model.exact_norms():
        expected = truth(policy, config, batch, DVRP)

        def found(contrast: Contrast = DVRP) -> float:
            policy_loss = PolicyLoss(policy, config, contrast=contrast, update="lean")
            return apart(gradients(policy, policy_loss(batch, batch.totals()).loss), expected)

        assert found() <= EXACT
        other = tuple(term._replace(coef=-term.coef) for term in DVRP.terms)
        assert found(replace(DVRP, terms=other)) > 1e-3
        k3 = Contrast._k3
        with monkeypatch.context() as patch:  # ∂k3/∂a in the place of ∂k3/∂c
            patch.setattr(Contrast, "_k3", lambda *of: (k3(*of)[0], -k3(*of)[1]))
            assert found() > 1e-3
        with monkeypatch.context() as patch:  # k3(c − a)
            patch.setattr(Contrast, "_k3", lambda self, c, a, clamp: k3(self, a, c, clamp))
            assert found() > 1e-3
        with monkeypatch.context() as patch:  # views in the other order
            view_logp = Scorer.view_logp
            patch.setattr(Scorer, "view_logp", lambda *of: view_logp(*of).flip(0))
            assert found() > 1e-3


def test_micro_batches_add_up(policy: Policy, batch: UpdateBatch) -> None:
    policy_loss, totals = PolicyLoss(policy, RomaConfig(), contrast=DVRP), batch.totals()
    with small_model.exact_norms():
        expected = gradients(policy, policy_loss(batch, totals).loss)
        found = torch.zeros_like(expected)
        parts = list(policy_loss.parts(batch, 200))
        assert len(parts) > 1
        for _, part in parts:
            found += gradients(policy, policy_loss(part, totals).loss)
    assert apart(found, expected) <= EXACT


@pytest.mark.parametrize(
    ("config", "contrast"),
    [(RomaConfig(), DVRP), (RomaConfig(ref_coef=0.3), None), (RomaConfig(entropy_coef=0.1), None)],
    ids=["dvrp", "reference", "entropy"],
)
def test_a_part_for_another_rank_adds_nothing(
    policy: Policy,
    batch: UpdateBatch,
    config: RomaConfig,
    contrast: Contrast | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Terms without an advantage, too: a prompt that stands in is not learnt from twice."""
    monkeypatch.setattr("roma.train.ranks.most", lambda count: 2)
    batch = replace(batch, ref_logp=batch.old_logp, aux_view=torch.zeros(18, dtype=torch.int64))
    (_, part), (rows, idle) = to_learn(batch, [9] * 6, 10**6)
    assert len(part.group) == 18 and not len(rows) and idle.idle and not part.idle
    for form in FORMS.values():
        policy_loss = PolicyLoss(policy, config, contrast=contrast, **form)
        out = policy_loss(idle, batch.totals())
        assert not gradients(policy, out.loss).any()
        busy = policy_loss(replace(idle, idle=False), batch.totals())
        assert gradients(policy, busy.loss).any()


def test_rollouts_without_a_token_and_text_alone(policy: Policy, batch: UpdateBatch) -> None:
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    text = batch.select([3, 5])
    for form in FORMS.values():
        policy_loss = PolicyLoss(policy, RomaConfig(), contrast=DVRP, **form)
        out = policy_loss(text, batch.totals())
        assert float(out.metrics["contrast_masked"]) == pytest.approx(0, abs=1e-25)
        assert torch.isfinite(out.loss)
    assert policy_loss.view_logp(nothing).shape == (2, 0)


def test_two_passes_have_nothing_to_choose(policy: Policy) -> None:
    with pytest.raises(ValueError, match="update: expected 'auto', 'joint' or 'lean' with PAPO"):
        PolicyLoss(policy, RomaConfig(), contrast=PAPO, update="two_pass")


@pytest.mark.parametrize("mode", ["papo", "dvrp"])
def test_a_run_logs_its_terms(tmp_path: Path, mode: str) -> None:
    """Two steps, and one that goes on from the first: the same weights to the bit."""
    options = f"algorithm.view_mode={mode}", f"algorithm.{mode}.probability=0.9"
    trainer = Trainer(run_config(tmp_path / "whole", *options, "trainer.save_freq=1"))
    assert trainer.view_maker.masked.parameter == 0.9
    lines: list[dict[str, float]] = []
    trainer.fit(lambda _, metrics: lines.append(dict(metrics)))
    named = {name for name in lines[0] if "contrast" in name}
    assert named == {f"actor/contrast_{n}" for n in ("masked", "noised")[: len(named)]}
    assert len(named) == (1 if mode == "papo" else 2)
    assert not any("roma" in name for name in lines[0])
    assert lines[0]["actor/contrast_masked"] > 0
    start = f"trainer.resume={tmp_path / 'whole' / 'global_step_1'}"
    resumed = Trainer(run_config(tmp_path / "resumed", *options, start))
    resumed.fit()
    pairs = zip(trainer.policy.parameters(), resumed.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
