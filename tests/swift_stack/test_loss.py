"""swift's own runs, with views and without, held to the float64 formulas of docs/MATH.md."""

import json

import pytest
import torch
from swift_stack import oracle

from roma.integrations.options import RomaOptions
from roma.testing import tolerance

VIEWS = "num_views=2,lambda_inv=2,lambda_aux=0.5"


def hold(call, options, kind, steps):
    """Loss and gradient of a micro-batch, and that ten times the bound would be found."""
    exact = oracle.loss(call, options, kind, steps=steps)
    eager = oracle.loss(call, options, kind, steps=steps, dtype=torch.float32)
    assert len(call.logp) == len(call.mask) + len(oracle.needed(call, options))
    for name, got, want, plain in zip(
        ("loss", "dlogp"), (call.loss, call.logp.grad), exact, eager, strict=True
    ):
        noise = tolerance.few(float(want.abs().max()))
        how = {"dtype": torch.float32, "noise": noise}
        limit = tolerance.check(name, got, want, plain, **how)
        off = got.clone()
        off.view(-1)[0] += tolerance.PLANTED * limit.largest
        assert tolerance.refuses(name, off, want, plain, **how)


@pytest.mark.parametrize("off", ["num_views=0", "lambda_inv=0,lambda_aux=0"])
def test_off_is_swift_bit_for_bit(run, off):
    changed = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4}
    stock, ours = run(None, **changed), run(off, **changed)
    assert stock.norms() == ours.norms()
    assert max(stock.norms()) > 0
    assert all(torch.equal(stock.weights[name], value) for name, value in ours.weights.items())
    assert not any("roma" in name for entry in ours.logs for name in entry)


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_on_is_the_formula(run, kind):
    made = run(VIEWS, loss_type=kind, gradient_accumulation_steps=2, max_steps=2)
    assert len(made.calls) == 4
    for call in made.calls:
        hold(call, RomaOptions.parse(VIEWS), kind, steps=2)
    # Every term was there to be seen.
    assert any(any(call.right) for call in made.calls)
    assert any(not all(call.right) for call in made.calls)
    assert max(made.logged("roma/penalty_worst")) > 1e-3
    assert max(abs(value) for value in made.logged("roma/aux_loss")) > 1e-4


@pytest.mark.parametrize(
    "chosen",
    ["penalty_over=correct", "worst_over=token", "penalty_ratio=clean/view", "lambda_aux=0"],
)
def test_options_are_the_formulas(run, chosen):
    text = f"num_views=3,lambda_inv=2,{chosen}"
    made = run(text, gradient_accumulation_steps=2)
    assert sum(sum(call.right) for call in made.calls)
    for call in made.calls:
        hold(call, RomaOptions.parse(text), "grpo", steps=2)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_a_reused_rollout_keeps_its_views_and_its_old_policy(run, kind):
    made = run(VIEWS, loss_type=kind, num_iterations=2, max_steps=2)
    first, second = made.calls
    for call in made.calls:
        assert call.old is not None
        hold(call, RomaOptions.parse(VIEWS), kind, steps=1)
    assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
    assert torch.equal(first.aux_view, second.aux_view)
    assert not torch.equal(first.logp[:4], second.logp[:4])  # the policy moved


def test_several_updates_of_one_rollout_batch(run):
    made = run(VIEWS, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=2)
    assert [call.step for call in made.calls] == [0, 0, 0, 0]
    for call in made.calls:
        assert call.old is not None
        hold(call, RomaOptions.parse(VIEWS), "grpo", steps=2)


def test_resampled_groups(run):
    made = run(VIEWS, dynamic_sample="true", max_steps=2)
    for call in made.calls:
        hold(call, RomaOptions.parse(VIEWS), "grpo", steps=1)


def test_lora_and_a_reference(run):
    changed = {"tuner_type": "lora", "beta": 0.04, "learning_rate": 1e-2}
    made = run(VIEWS, max_steps=2, target_modules="all-linear", **changed)
    grads = {name for name, grad in made.trainer.grads.items() if grad.abs().max() > 0}
    assert grads and all("lora" in name for name in grads)
    # The first step: the policy is the reference, whose term has neither value nor slope.
    hold(made.calls[0], RomaOptions.parse(VIEWS), "grpo", steps=1)
    assert made.logged("kl")[1] > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(run, reentrant):
    plain = run(VIEWS, max_steps=2)
    setting = json.dumps({"use_reentrant": reentrant})
    kept = run(
        VIEWS, max_steps=2, gradient_checkpointing="true", gradient_checkpointing_kwargs=setting
    )
    assert plain.norms() == kept.norms()


def test_the_sampler_correction_reaches_the_auxiliary_loss(run, monkeypatch):
    from swift_stack.probe import Ours

    prepared = Ours._prepare_batch_inputs

    def with_sampler(self, samples):
        batches = prepared(self, samples)
        self.disable_rollout_importance_sampling = False
        for batch in batches:
            own = batch["grpo_batch"]
            off = torch.linspace(-1, 1, own.old_per_token_logps.numel())
            own.rollout_per_token_logps = own.old_per_token_logps + off.view_as(own.completion_mask)
        return batches

    monkeypatch.setattr(Ours, "_prepare_batch_inputs", with_sampler)
    made = run(VIEWS, rollout_importance_sampling_mode="token_truncate", learning_rate=0)
    (call,) = made.calls
    off = torch.linspace(-1, 1, call.mask.numel(), dtype=torch.float64).view_as(call.mask)
    call.weight = (-off).exp().clamp(max=2.0)
    hold(call, RomaOptions.parse(VIEWS), "grpo", steps=1)
