"""The FLOP model under adapters is held to torch's counter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.layout import Layout
from bench.update_step.count import Counted, counted
from bench.update_step.made import Made, make
from bench.update_step.predicted import MODELS, prompts_of
from bench.variants import Variant
from roma import RomaConfig
from roma.models.flops import Adapters, Cost, Form, Prompt, TextShape, VisionShape, cheaper, update
from roma.models.lora import TARGETS, add_adapters
from roma.train.update import PolicyLoss, Update

# As in test_flops.py: rows are exact, groups on a CPU 1.2 to 1.7 % off, the head's blocks 3 %.
EXACT, CLOSE, HEAD = 1e-9, 0.03, 0.05
UNCLIPPED = RomaConfig(clip_low=1.0, clip_high=1e3, dual_clip=None)
LAYOUT = Layout(prompts=2, rollouts=4, completion=24, prompt=24, image=12, layers=2)
RANK = 8
ROWS, SHARED = Form("joint", share_prompt=False), Form("lean")


def made_in(folder: Path, targets: tuple[str, ...], checkpointed: bool) -> Made:
    variant = Variant("update_step", "both", 0, 1, 96, 64, "fp32", what=str(LAYOUT))
    made = make(variant, folder, "cpu")
    add_adapters(made.policy, rank=RANK, targets=targets)
    if checkpointed:
        made.policy.checkpoint()
    return made


def run(made: Made, form: Form) -> Counted:
    """One update, counted; sampling has left the clean images' features."""
    loss = PolicyLoss(made.policy, UNCLIPPED, update=form.pairs, share_prompt=form.share_prompt)
    prompts = made.batch.prompts
    with torch.no_grad():
        known = made.policy.image_features(prompts.pixel_values, prompts.grids)
    batch = replace(made.batch, clean_features=known)

    def call() -> Update:
        out: Update = loss(batch, batch.totals())
        out.loss.backward()
        return out

    call()
    return counted(call, list(made.policy.parameters()))


def say(made: Made, form: Form, adapters: Adapters | None, checkpointed: bool) -> Cost:
    config = made.policy.model.config
    shapes = TextShape.of(config), VisionShape.of(config)
    options = {"checkpointed": checkpointed, "vision_trained": False, "adapters": adapters}
    return update(*shapes, prompts_of(made.batch), form, views=1, **options)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "k_proj", "v_proj")], ids=["all", "qkv"])
@pytest.mark.parametrize("form", [ROWS, SHARED], ids=["rows", "shared"])
def test_adapters_are_held_to_the_counter(
    form: Form, targets: tuple[str, ...], checkpointed: bool, tmp_path: Path
) -> None:
    made = made_in(tmp_path, targets, checkpointed)
    adapters = made.policy.adapters
    assert adapters == Adapters(RANK, adapters.targets) and {*adapters.targets} == {*targets}
    found = run(made, form)
    said = say(made, form, adapters, checkpointed)
    bound = CLOSE if form.share_prompt else EXACT
    assert (said.text + said.vision) / found.model == pytest.approx(1, abs=bound)
    for wrong in (None, Adapters(3 * RANK, targets)):
        other = say(made, form, wrong, checkpointed)
        assert abs((other.text + other.vision) / found.model - 1) > 2 * bound
    if checkpointed:
        return
    # Of one view the sampled one is the worst.
    assert said.head == pytest.approx(found.head, rel=HEAD)
    row = TextShape.of(made.policy.model.config).row
    assert row * float(made.batch.mask.sum()) > 2 * HEAD * found.head  # a head that is trained


def test_frozen_weights_have_two_passes_pay_later() -> None:
    """A backward pass that costs as much as the forward saves less: from K = 9 on, not 6."""
    text, vision = MODELS["Qwen3-VL-4B"]
    prompt = Prompt(1200, [4096], [512] * 8, [True] * 4 + [False] * 4)
    adapters, counts = Adapters(16, TARGETS), range(1, 17)
    first = [
        next(
            k
            for k in counts
            if cheaper(text, vision, [prompt], views=k, vision_trained=False, adapters=own)
            == "two_pass"
        )
        for own in (None, adapters)
    ]
    assert first == [6, 9]
