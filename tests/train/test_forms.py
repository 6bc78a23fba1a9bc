"""The forms of the update against the joint one with a row per completion, in fp64 and fp32."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import small_model
from torch import Tensor

from roma.models.prefix import attention as prefix_attention
from roma.models.qwen_vl import Policy
from roma.train.batch import Totals, UpdateBatch
from roma.train.plan import Plan
from roma.train.update import PolicyLoss, Update
from roma_kernels.roma_loss.config import RomaConfig

EXACT = 1e-12  # of a gradient's norm; 2e-15 was measured, a wrong view gives 0.6
FORMS: dict[str, dict[str, Any]] = {
    "joint, shared": {"update": "joint"},
    "lean, rows": {"update": "lean", "share_prompt": False},
    "lean, shared": {"update": "lean"},
    "two_pass, rows": {"update": "two_pass", "share_prompt": False},
    "two_pass, shared": {"update": "two_pass"},
}
KINDS = ("mixed", "all_wrong", "all_right", "no_advantage", "one_token", "text_only", "first")
TOTALS = Totals(sequences=20, tokens=80, correct=15)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return small_model.policy()


@pytest.fixture(scope="module")
def policy64() -> Policy:
    return small_model.policy().double()


def batch_of(policy: Policy, views: int, kind: str) -> UpdateBatch:
    """Three padded prompts with one, two and one images × 4 rollouts, some of them equal."""
    if kind == "text_only":
        prompts = policy.encode_prompts(["sum ?", "so larger sum ?", "larger ?"], [[], [], []])
    else:
        prompts = small_model.mixed_prompts(policy)
    dtype = policy.head_weight.dtype
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(9, 20, (12, 5), generator=generator)
    tokens[1], tokens[7] = tokens[0], tokens[6]
    lengths = torch.tensor([5, 5, 3, 4, 5, 2, 4, 4, 5, 1, 5, 3])
    lengths = torch.ones_like(lengths) if kind == "one_token" else lengths
    right = torch.arange(12) % 3 != 1
    if kind in ("all_wrong", "all_right"):
        right = torch.full((12,), kind == "all_right")
    advantages = torch.randn(12, generator=generator)
    if kind == "no_advantage":  # of a prompt that has right rollouts, and of one that has none
        advantages[4:], right[8:] = 0, False
    # Near the policy's own, so that ratios are not all clipped.
    old = -2.9 + 0.2 * torch.randn(12, 5, generator=generator)
    changes = [1 / 2, 1 / 3, -1, 1 / 5][:views]
    return UpdateBatch(
        prompts=replace(prompts, pixel_values=prompts.pixel_values.to(dtype)),
        view_pixels=[prompts.pixel_values.to(dtype) * change for change in changes],
        group=torch.arange(3).repeat_interleave(4),
        tokens=tokens,
        mask=torch.arange(5) < lengths[:, None],
        advantages=advantages.to(dtype),
        correct=right,
        aux_view=torch.randint(views, (12,), generator=generator) if views else None,
        old_logp=None if kind == "first" else old.to(dtype),
    )


def run(policy: Policy, config: RomaConfig, batch: UpdateBatch, **form: Any) -> tuple[Update, dict]:
    policy.zero_grad()
    out = PolicyLoss(policy, config, **form)(batch, TOTALS)
    out.loss.backward()
    grads = {n: w.grad.clone() for n, w in policy.named_parameters() if w.grad is not None}
    return out, grads


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the whole gradient; one that is not there is 0."""
    zero = torch.zeros(())
    names = found.keys() | expected.keys()
    off = [found.get(n, zero).double() - expected.get(n, zero).double() for n in names]
    norm = sum(float(x.double().square().sum()) for x in expected.values()) ** 0.5
    return sum(float(x.square().sum()) for x in off) ** 0.5 / max(norm, 1e-30)


def joint(policy: Policy, config: RomaConfig, batch: UpdateBatch) -> tuple[Update, dict]:
    return run(policy, config, batch, update="joint", share_prompt=False)


def forms_of(config: RomaConfig) -> dict[str, dict[str, Any]]:
    both = config.worst_over in ("sequence", "batch")
    return {n: f for n, f in FORMS.items() if both or f["update"] != "two_pass"}


@pytest.mark.parametrize(
    ("views", "kind"),
    [(2, kind) for kind in KINDS] + [(k, kind) for k in (1, 4) for kind in KINDS[::3]],
)
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
def test_every_form_is_the_joint_one(
    policy64: Policy, views: int, worst_over: str, kind: str
) -> None:
    over = "correct" if worst_over == "token" else "all"
    config = RomaConfig(worst_over=worst_over, penalty_over=over, lambda_aux=0.7)
    batch = batch_of(policy64, views, kind)
    with small_model.exact_norms():
        expected, gradients = joint(policy64, config, batch)
        for name, form in forms_of(config).items():
            out, found = run(policy64, config, batch, **form)
            assert apart(found, gradients) <= EXACT, name
            torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=1e-12)
            for metric, value in expected.metrics.items():
                if metric == "ppo_kl" and out.scored != expected.scored:
                    continue  # a mean over what was run
                torch.testing.assert_close(
                    out.metrics[metric], value, rtol=0, atol=1e-12, msg=f"{name}: {metric}"
                )
            torch.testing.assert_close(
                out.divergence, expected.divergence, rtol=0, atol=1e-12, equal_nan=True
            )
            scored = out.logp != 0
            torch.testing.assert_close(out.logp[scored], expected.logp[scored], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_in_fp32_it_is_as_exact_as_rows_are(policy: Policy, policy64: Policy, form: str) -> None:
    """Off the fp64 gradient by at most half more than a row per completion is: 1.4e-6 both."""
    config = RomaConfig()
    with small_model.exact_norms():
        _, truth = joint(policy64, config, batch_of(policy64, 2, "mixed"))
    batch = batch_of(policy, 2, "mixed")
    _, rows = joint(policy, config, batch)
    _, found = run(policy, config, batch, **FORMS[form])
    assert apart(found, truth) <= 1.5 * apart(rows, truth) < 3e-6


def test_nothing_but_the_clean_pass_without_views(policy64: Policy) -> None:
    batch = batch_of(policy64, 0, "mixed")
    with small_model.exact_norms():
        _, expected = joint(policy64, RomaConfig(), batch)
        for name, form in FORMS.items():
            out, found = run(policy64, RomaConfig(), batch, **form)
            assert apart(found, expected) <= EXACT, name
            assert out.divergence.shape == (0, 12)


OBJECTIVES = {
    "cispo": RomaConfig(main="cispo", clip_high=5.0, aggregation="dapo"),
    "gspo": RomaConfig(ratio_level="sequence", aggregation="luspo"),
    "sapo": RomaConfig(main="sapo", ratio_level="sequence", entropy_coef=0.05),
    "vespo": RomaConfig(main="vespo", aggregation="dapo"),
    "unbiased": RomaConfig(ref_coef=0.2, ref_unbiased=True, gate_tau=0.1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_in_two_forms(policy64: Policy, name: str) -> None:
    """With the sampler's weights, by token."""
    config = OBJECTIVES[name]
    batch = batch_of(policy64, 2, "no_advantage")
    weight = torch.linspace(0.2, 2, 60, dtype=torch.float64).view(12, 5)
    assert batch.old_logp is not None
    ref = batch.old_logp - 0.1 if config.ref_coef else None
    batch = replace(batch, rollout_weight=weight, ref_logp=ref)
    plan = Plan.of(batch, config, lean=True)
    every = config.ref_coef > 0 or config.entropy_coef > 0
    assert plan.gain[:4].all() and (plan.gain[4:].all() if every else not plan.gain[4:].any())
    with small_model.exact_norms():
        expected, gradients = joint(policy64, config, batch)
        for form in ("lean, rows", "two_pass, shared"):
            out, found = run(policy64, config, batch, **FORMS[form])
            assert apart(found, gradients) <= EXACT, form
            assert out.metrics.keys() == expected.metrics.keys()
            for metric, value in expected.metrics.items():
                if metric == "ppo_kl" and out.scored != expected.scored:
                    continue
                torch.testing.assert_close(
                    out.metrics[metric], value, rtol=0, atol=1e-12, msg=f"{form}: {metric}"
                )
        assert ("entropy" in expected.metrics) == (config.entropy_coef > 0)
        without = joint(policy64, config, replace(batch, rollout_weight=None))[1]
    assert apart(without, gradients) > 1e-3


@pytest.mark.parametrize("bound", ["some", "none", "all"])
def test_a_gate_in_every_form(policy64: Policy, bound: str) -> None:
    """Views above the bound are left out of the maximum, and of right rollouts' gradient."""
    batch = batch_of(policy64, 3, "mixed")
    right = batch.correct
    with small_model.exact_norms():
        ungated, plain = joint(policy64, RomaConfig(), batch)
        found = ungated.divergence[:, right].flatten()
        # Not at one of them, where rounding would decide.
        bounds = {"some": 1.001 * found.median(), "none": found.max() + 1, "all": found.min() / 2}
        at = bounds[bound]
        config = RomaConfig(gate_bound=at, gate_tau=0.5 if bound == "some" else None)
        expected, gradients = joint(policy64, config, batch)
        share = float((found > at).double().sum()) / (3 * TOTALS.sequences)
        assert float(expected.metrics["roma_gated"]) == pytest.approx(share, rel=1e-9)
        for form, options in FORMS.items():
            out, own = run(policy64, config, batch, **options)
            assert apart(own, gradients) <= EXACT, form
            for metric, value in expected.metrics.items():
                torch.testing.assert_close(
                    out.metrics[metric], value, rtol=0, atol=1e-12, msg=f"{form}: {metric}"
                )
            torch.testing.assert_close(
                out.divergence, expected.divergence, rtol=0, atol=1e-12, equal_nan=True
            )
        if bound == "all":
            none = joint(policy64, RomaConfig(lambda_inv=0.0), batch)[1]
            assert apart(gradients, none) <= EXACT and share > 0
        elif bound == "none":
            assert apart(gradients, plain) <= EXACT and share == 0
        else:
            assert apart(gradients, plain) > 1e-3
            worst = ungated.divergence.masked_fill(ungated.divergence > at, 0).amax(0)[right]
            penalty = (worst * (-worst / 0.5).exp()).sum() / TOTALS.sequences
            torch.testing.assert_close(
                expected.metrics["roma_penalty_worst"], penalty, rtol=0, atol=1e-12
            )


def test_a_gate_after_the_choice_is_found(
    policy64: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes that run the worst view of all, which the loss then leaves out."""
    batch = batch_of(policy64, 3, "mixed")
    with small_model.exact_norms():
        found = joint(policy64, RomaConfig(), batch)[0].divergence[:, batch.correct]
        config = RomaConfig(gate_bound=1.001 * float(found.median()))
        _, expected = joint(policy64, config, batch)
        loss = PolicyLoss(policy64, config, update="two_pass")
        choose, loss_config = loss._choose, loss.config

        def ungated(*given: Any) -> Any:
            loss.config = replace(loss_config, gate_bound=None)
            chosen = choose(*given)
            loss.config = loss_config
            return chosen

        monkeypatch.setattr(loss, "_choose", ungated)
        policy64.zero_grad()
        loss(batch, TOTALS).loss.backward()
        own = {n: w.grad.clone() for n, w in policy64.named_parameters() if w.grad is not None}
    assert apart(own, expected) > 1e-3


def test_tokens_of_a_micro_batch_divide_no_loss(policy64: Policy) -> None:
    with pytest.raises(ValueError, match="aggregation: expected 'grpo', 'dapo', 'dr_grpo' or"):
        PolicyLoss(policy64, RomaConfig(aggregation="bnpo"))


def test_a_reference_needs_every_rollout(policy64: Policy) -> None:
    """β > 0: a rollout without an advantage has the KL's gradient. main=None: the views alone."""
    batch = batch_of(policy64, 2, "no_advantage")
    plan = Plan.of(batch, RomaConfig(ref_coef=0.1), lean=True)
    assert plan.gain.all() and plan.clean.all()
    assert not Plan.of(batch, RomaConfig(main=None), lean=True).gain.any()
    config = RomaConfig(main=None, lambda_aux=0.3)
    with small_model.exact_norms():
        _, expected = joint(policy64, config, batch)
        _, found = run(policy64, config, batch, update="lean")
    assert apart(found, expected) <= EXACT


@pytest.mark.parametrize("name", ["advantages", "rollout_weight"])
def test_numbers_of_tokens(policy64: Policy, name: str) -> None:
    """Of as many rollouts as tokens, too: they are not taken for numbers of rollouts."""
    batch = batch_of(policy64, 2, "mixed")
    by_token = batch.advantages[:, None] * torch.linspace(0.5, 1, 5, dtype=torch.float64)
    by_token = by_token.abs() if name == "rollout_weight" else by_token
    few = torch.arange(5) < torch.tensor([3, 0, 1, 1, 1, 1, 0, 2, 1, 1, 1, 0])[:, None]
    for mask in (batch.mask, few):
        own = replace(batch, mask=mask, **{name: by_token})
        with small_model.exact_norms():
            _, expected = joint(policy64, RomaConfig(), own)
            for form in ("lean, shared", "two_pass, shared"):
                assert apart(run(policy64, RomaConfig(), own, **FORMS[form])[1], expected) <= EXACT


def test_checkpointed(policy64: Policy) -> None:
    batch, config, model = batch_of(policy64, 2, "mixed"), RomaConfig(), policy64.model
    with small_model.exact_norms():
        _, expected = joint(policy64, config, batch)
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        try:
            for name, form in FORMS.items():
                found = run(policy64, config, batch, **form)[1]
                assert apart(found, expected) <= EXACT, name
        finally:
            model.activation_checkpointing_disable()
            model.eval()


def test_a_wrong_choice_of_view_is_found(policy64: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with_worst = Plan.with_worst
    monkeypatch.setattr(
        Plan, "with_worst", lambda self, worst: with_worst(self, (worst + 1) % len(self.views))
    )
    batch = batch_of(policy64, 2, "mixed")
    with small_model.exact_norms():
        _, expected = joint(policy64, RomaConfig(), batch)
        found = run(policy64, RomaConfig(), batch, update="two_pass")[1]
    assert apart(found, expected) > 1e-2


def test_a_wrong_position_is_found(policy64: Policy) -> None:
    batch = batch_of(policy64, 2, "mixed")
    prompts = replace(batch.prompts, next_position=batch.prompts.next_position + 1)
    with small_model.exact_norms():
        _, expected = joint(policy64, RomaConfig(), batch)
        found = run(policy64, RomaConfig(), replace(batch, prompts=prompts), update="lean")[1]
    assert apart(found, expected) > 1e-3


def test_a_leaking_mask_is_found(policy64: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion that sees its own next token."""
    tri = np.tri
    monkeypatch.setattr(
        prefix_attention.np, "tri", lambda n, m, k, dtype: tri(n, m, k + 1, dtype=dtype)
    )
    batch = batch_of(policy64, 2, "mixed")
    with small_model.exact_norms():
        _, expected = joint(policy64, RomaConfig(), batch)
        found = run(policy64, RomaConfig(), batch, update="lean")[1]
    assert apart(found, expected) > 1e-2


def test_forms_that_do_not_exist(policy: Policy) -> None:
    with pytest.raises(
        ValueError, match="update: expected one of auto, joint, lean, two_pass, got"
    ):
        PolicyLoss(policy, RomaConfig(), update="single")
    with pytest.raises(ValueError, match="worst_over: expected 'sequence' or 'batch', because"):
        PolicyLoss(policy, RomaConfig(worst_over="token"), update="two_pass")


def test_without_a_penalty_it_is_not_logged(policy64: Policy) -> None:
    """Its views are not run then, but for the auxiliary loss."""
    batch, config = batch_of(policy64, 2, "mixed"), RomaConfig(lambda_inv=0.0)
    with small_model.exact_norms():
        expected, gradients = joint(policy64, config, batch)
        assert "roma_aux_loss" in expected.metrics and expected.divergence.isnan().all()
        for name, form in FORMS.items():
            out, found = run(policy64, config, batch, **form)
            assert apart(found, gradients) <= EXACT, name
            assert out.metrics.keys() == expected.metrics.keys()
            assert "roma_penalty_mean" not in out.metrics
            assert out.divergence.isnan().all()


def test_rollouts_without_a_token(policy64: Policy) -> None:
    batch = batch_of(policy64, 2, "mixed")
    mask = batch.mask & (torch.arange(12) % 4 != 0)[:, None]  # three, two of them right
    with small_model.exact_norms():
        expected, gradients = joint(policy64, RomaConfig(), replace(batch, mask=mask))
        for name, form in FORMS.items():
            out, found = run(policy64, RomaConfig(), replace(batch, mask=mask), **form)
            assert apart(found, gradients) <= EXACT, name
            torch.testing.assert_close(
                out.divergence, expected.divergence, rtol=0, atol=1e-12, equal_nan=True
            )


def test_a_mask_with_a_hole_is_refused(policy: Policy) -> None:
    batch = batch_of(policy, 2, "mixed")
    mask = batch.mask.clone()
    mask[0, 1] = False
    with pytest.raises(ValueError, match=r"mask: expected each row True up to .* end, got a row"):
        run(policy, RomaConfig(), replace(batch, mask=mask), update="lean")
