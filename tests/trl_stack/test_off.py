"""Switched off, the trainer is TRL's, bit for bit; switched on, it samples what TRL's samples."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from trl_stack import small

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
OFF = {
    "no views": {"num_views": 0},
    "no weights": {"lambda_inv": 0.0, "lambda_aux": 0.0},
}
SCHEDULE = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,  # a step moves a weight by as much
    "max_steps": 10,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 4,
}


def marks(folder):
    """Image and video tokens."""
    config = Qwen3VL.config_class.from_pretrained(folder)
    return [config.image_token_id, config.video_token_id]


def trained(folder, out, base, **options):
    """Losses by micro-batch, and the weights at the end."""
    # TRL 1.15 samples image tokens, and fails on them.
    given = {**SCHEDULE, "generation_kwargs": {"suppress_tokens": marks(folder)}, **options}
    trainer = small.run(folder, out, base=base, **given)
    return (
        [loss for step in trainer.steps for loss in step.losses],
        small.weights_of(trainer),
        trainer.steps[0].weights,
    )


@pytest.fixture(scope="module")
def stock(folder, tmp_path_factory):
    """TRL's own run of a loss type, once."""
    out = tmp_path_factory.mktemp("stock")
    return functools.cache(lambda kind: trained(folder, out, small.Stock, loss_type=kind))


def furthest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in other)


@pytest.mark.parametrize(
    ("loss_type", "off"),
    [*((kind, "no views") for kind in LOSS_TYPES), ("dapo", "no weights"), ("grpo", "no weights")],
)
def test_off_is_trl_bit_for_bit(folder, tmp_path, stock, loss_type, off):
    losses, weights, before = stock(loss_type)
    assert len(losses) == 20 and furthest(weights, before) > 5e-3  # the weights did move
    got, own, _ = trained(folder, tmp_path, small.Roma, loss_type=loss_type, **OFF[off])
    assert got == losses
    assert furthest(own, weights) == 0


def test_a_weight_of_a_thousandth_would_be_seen(folder, tmp_path, stock):
    losses, weights, _ = stock("grpo")
    got, own, _ = trained(
        folder, tmp_path, small.Roma, loss_type="grpo", lambda_inv=0.0, lambda_aux=1e-3
    )
    assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) > 1e-6
    assert furthest(own, weights) > 1e-6


def test_views_do_not_change_what_is_sampled(folder, tmp_path):
    """Draws of views touch no generator. (Image tokens, which ROMA never samples, are left out.)"""
    batches, states = [], []
    for base, own in ((small.Stock, {}), (small.Roma, {"num_views": 3})):
        run = small.run(
            folder,
            tmp_path,
            base=base,
            steps_per_generation=4,
            generation_kwargs={"suppress_tokens": marks(folder)},
            **own,
        )
        batches.append(run.steps[0].batches)
        states.append(
            (torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()))
        )
    assert states[0] == states[1]
    for one, other in zip(*batches, strict=True):
        for name in ("prompt_ids", "completion_ids", "advantages", "pixel_values"):
            assert torch.equal(one[name], other[name])
