"""Adapters, gradient checkpointing and resumed runs, in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from trl_stack import ranks, small

REENTRANT = [{"use_reentrant": True}, {"use_reentrant": False}]
# Log-probs are fp32 sums of some 10^3 products through four layers, up to 10 nats: √10^3 · 2^-24 ·
# 10 = 2e-5. Views move them by 0.1 and more.
LOGP = 1e-4

Build = Callable[..., Any]


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Build:
    """Builds trainers of the small model, with adapters unless lora=False."""

    def of(*, lora: bool = True, targets: Any = None, **options: Any) -> Any:
        own = {} if targets is None else {"target_modules": targets}
        given = {"peft_config": ranks.adapters(**own)} if lora else {}
        quiet = {"gradient_checkpointing": False, "view_max_level": 5.0}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        return small.build(folder, out, given=given, **{**quiet, **options})

    return of


def whole(trainer: Any) -> dict[str, Tensor]:
    """All weights, of the base model and of adapters."""
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters()}


def off(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """‖found − want‖ / ‖want‖."""
    assert found.keys() == want.keys()
    parts = torch.stack([(found[n] - w).double().norm() for n, w in want.items()])
    return float(parts.norm() / torch.stack([w.double().norm() for w in want.values()]).norm())


def scores(model: Any, batch: dict[str, Any]) -> Tensor:
    """[B, T] log-probs of a micro-batch by the model's own logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention, **inputs).logits
    keep = batch["completion_ids"].shape[1]
    logp = logits[:, -keep - 1 : -1].float().log_softmax(-1)
    return logp.gather(-1, batch["completion_ids"][..., None])[..., 0]


def test_adapters_train_and_nothing_else(build) -> None:
    trainer = build(learning_rate=1e-1)
    before = whole(trainer)
    trainer.train()
    after = whole(trainer)
    moved = {name for name, w in after.items() if not torch.equal(w, before[name])}
    assert moved and moved == {name for name in after if "lora_" in name}
    assert trainer.state.log_history[0]["roma/penalty_worst"] > 1e-2


def test_the_views_alone_reach_the_adapters(build) -> None:
    """With the same rollouts: the two terms change the gradient, as they would without adapters."""
    grads = []
    for weight in (0.0, 1.0):
        trainer = build(lambda_inv=weight)
        trainer.train()
        grads.append(trainer.steps[0].gradients)
    assert off(*grads) > 1e-2


def test_the_reference_sees_clean_images_without_adapters(build, folder) -> None:
    trainer = build(beta=0.1)
    trainer.train()
    base = Qwen3VL.from_pretrained(folder)
    for batch in trainer.steps[0].batches:
        mask = batch["completion_mask"].bool()
        want, adapted = scores(base, batch), scores(trainer.model, batch)
        assert (batch["ref_per_token_logps"] - want)[mask].abs().max() < LOGP
        assert (adapted - want)[mask].abs().max() > 100 * LOGP  # the adapters do something
    assert trainer.state.log_history[0]["kl"] > 0


def test_an_adapter_on_the_head_is_refused(build) -> None:
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        build(targets=["q_proj", "lm_head"])


def test_adapters_on_all_linear_layers(build) -> None:
    """Which leaves the head out and takes the vision tower in."""
    trainer = build(targets="all-linear", learning_rate=1e-1)
    before = whole(trainer)
    trainer.train()
    moved = {name for name, w in whole(trainer).items() if not torch.equal(w, before[name])}
    assert any("visual" in name for name in moved)
    assert not any("lm_head" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize(
    "options",
    [{}, {"share_prompts": True}, {"num_iterations": 2, "steps_per_generation": 4}],
    ids=["plain", "shared", "reused"],
)
def test_checkpointing_changes_no_gradient(build, lora, options) -> None:
    """Reentrant or not: the same operations, once more."""
    made = []
    for chosen in (None, *REENTRANT):
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": chosen}
        given = {} if chosen is None else checkpointing
        trainer = build(lora=lora, penalty_over="correct", max_steps=2, **given, **options)
        calls = _count(trainer)
        trainer.train()
        made.append(([step.gradients for step in trainer.steps], calls[0]))
    (plain, once), *others = made
    for found, twice in others:
        assert twice > once  # layers were run again
        for got, want in zip(found, plain, strict=True):
            assert off(got, want) <= 1e-6


def _count(trainer: Any) -> list[int]:
    """Counts the times that the first text layer begins: in rollouts, passes and backwards."""
    calls = [0]
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()

    def add(*_: Any) -> None:
        calls[0] += 1

    base.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(add)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_a_resumed_run_goes_on_as_it_would_have(build, lora) -> None:
    """Two of four steps, and on from the files: the same rollouts, views, weights, to the bit."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    options |= {"optim": "adamw_torch", "log_completions": False}
    through = build(lora=lora, **options)
    through.train()
    again = build(lora=lora, **options)
    again.train(resume_from_checkpoint=str(Path(through.args.output_dir) / "checkpoint-2"))
    assert again.state.global_step == 4 and len(again.steps) == 2
    assert off(again.steps[0].weights, through.steps[0].weights) > 1e-5  # not from the start
    assert off(whole(again), whole(through)) == 0
    lines = [
        [{k: v for k, v in entry.items() if k.startswith("roma/")} for entry in log]
        for log in (again.state.log_history, through.state.log_history)
    ]
    assert lines[0][:4] == lines[1][:4] and lines[1][3]["roma/penalty_worst"] > 0
