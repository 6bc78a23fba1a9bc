"""A prompt once for all its rollouts: the same loss and gradient as with a row per rollout."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from examples.trl import tiny
from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer
from roma.integrations.trl.look import Look

GROUP, PROMPTS = 4, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny.model(tmp_path_factory.mktemp("tiny"))
    tiny.warm_start(made)
    return made


class Kept(RomaGRPOTrainer):
    """Keeps the loss and the gradients of its step, and counts the tokens of its forwards."""

    def training_step(self, model, *args):
        self.tokens = 0
        hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        made = super().training_step(model, *args)
        hook.remove()
        self.gradients = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        return made

    def _count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()


def right(completions, **_):
    """Every other rollout of a group."""
    return [float(number % 2) for number in range(len(completions))]


def mixed(rows):
    """The second prompt of three is text alone."""
    images = [[] if n % PROMPTS == 1 else row["images"] for n, row in enumerate(rows)]
    return Dataset.from_dict({"prompt": list(rows["prompt"]), "images": images})


def run(folder, tmp_path, *, data=None, precision="float32", **given):
    given = {"loss_type": "grpo", "num_generations": GROUP, "view_max_level": 5.0, **given}
    quiet = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    view_fn = given.pop("view_fn", None)
    trainer = Kept(
        model=Qwen3VL.from_pretrained(folder, dtype=precision),
        processing_class=tiny.processor(folder),
        reward_funcs=right,
        train_dataset=tiny.stripes(PROMPTS) if data is None else data,
        view_fn=view_fn,
        args=RomaGRPOConfig(
            per_device_train_batch_size=GROUP * PROMPTS,
            max_completion_length=6,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            shuffle_dataset=False,
            **quiet,
            **given,
        ),
    )
    trainer.train()
    return trainer


def apart(one, other):
    """‖difference‖ / ‖gradient‖ over all weights."""
    assert one.gradients.keys() == other.gradients.keys()
    norm = sum(g.double().pow(2).sum() for g in one.gradients.values()).sqrt()
    gaps = [
        (g.double() - other.gradients[n].double()).pow(2).sum() for n, g in one.gradients.items()
    ]
    return float(sum(gaps).sqrt() / norm)


@pytest.mark.parametrize("settings", [{}, {"view_update": "joint", "worst_over": "token"}])
def test_loss_and_gradient_are_those_of_rows(folder, tmp_path, settings):
    rows = run(folder, tmp_path, **settings)
    shared = run(folder, tmp_path, share_prompts=True, **settings)
    assert shared.tokens < 0.6 * rows.tokens
    # fp32: sums in another order; rows themselves are 1.4e-6 from float64 (docs/COST.md).
    assert apart(rows, shared) < 4e-6
    first, second = rows.state.log_history[0], shared.state.log_history[0]
    assert first["roma/penalty_worst"] > 1e-4  # the views matter
    for name in ("loss", "roma/penalty_worst", "roma/aux_loss", "entropy"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


def test_prompts_of_text_alone_stand_between_the_others(folder, tmp_path):
    data = mixed(tiny.stripes(PROMPTS))
    rows = run(folder, tmp_path, data=data)
    shared = run(folder, tmp_path, data=data, share_prompts=True)
    assert apart(rows, shared) < 4e-6


def test_prompts_of_a_view_fn_are_shared_too(folder, tmp_path):
    def views(row, count, step):
        ask = ("say which way they run", "do they run down")
        return [{**row, "prompt": [{"role": "user", "content": text}]} for text in ask[:count]]

    rows = run(folder, tmp_path, view_fn=views)
    shared = run(folder, tmp_path, view_fn=views, share_prompts=True)
    # Rows are padded on the left here, so that rotary angles differ in their last digits.
    assert apart(rows, shared) < 1e-5
    assert shared.tokens < 0.6 * rows.tokens


def test_a_rollout_behind_the_prompt_of_another_is_found(folder, tmp_path, monkeypatch):
    """The bound bites: one row takes another prompt's images and words."""
    rows = run(folder, tmp_path)
    whole = Look.identities

    def confused(self):
        found = whole(self)
        return [found[0] if n == GROUP else key for n, key in enumerate(found)]

    monkeypatch.setattr(Look, "identities", confused)
    assert apart(rows, run(folder, tmp_path, share_prompts=True)) > 1e-3


def test_groups_stay_whole_when_trl_shuffles(folder, tmp_path):
    """Two micro-batches of whole groups out of one generation."""
    given = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GROUP}
    quiet = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    seen = []

    class Watched(RomaGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(
                len({tuple(row) for row in inputs["roma_row"].div(GROUP).int()[:, None].tolist()})
            )
            return super()._compute_loss(model, inputs)

    Watched(
        model=Qwen3VL.from_pretrained(folder),
        processing_class=tiny.processor(folder),
        reward_funcs=right,
        train_dataset=tiny.stripes(4),
        args=RomaGRPOConfig(
            num_generations=GROUP, max_steps=2, share_prompts=True, **given, **quiet
        ),
    ).train()
    assert seen == [1] * 4


def test_a_model_that_cannot_share_is_refused(folder, tmp_path):
    model = Qwen3VL.from_pretrained(folder)
    model.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="full attention in every layer"):
        RomaGRPOTrainer(
            model=model,
            processing_class=tiny.processor(folder),
            reward_funcs=right,
            train_dataset=tiny.stripes(4),
            args=RomaGRPOConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=False,
                share_prompts=True,
                report_to="none",
            ),
        )
    with pytest.raises(ValueError, match="roma_lm_head: expected True, because share_prompts is"):
        RomaGRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            share_prompts=True,
            roma_lm_head=False,
        )


def test_a_step_without_a_token_to_count(folder, tmp_path):
    """Every completion is cut and masked out."""
    torch.manual_seed(0)
    trainer = run(
        folder,
        tmp_path,
        share_prompts=True,
        mask_truncated_completions=True,
        generation_kwargs={"min_new_tokens": 6},
    )
    norms = [float(g.abs().max()) for g in trainer.gradients.values()]
    assert max(norms) == 0
