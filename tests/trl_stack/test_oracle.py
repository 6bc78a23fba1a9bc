"""The gradient of a step is that of the formulas, in float64, for every loss type and option."""

from __future__ import annotations

import pytest
import torch
from trl_stack import small
from trl_stack.oracle import Oracle
from trl_stack.small import LAMBDAS, held, vector

from roma.testing.tolerance import PLANTED

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")
# A reference and an old policy that differ from the current one come with the second step.
TWO_STEPS = {"num_iterations": 2, "max_steps": 2}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_type(folder, tmp_path, loss_type):
    trainer = small.run(folder, tmp_path, loss_type=loss_type, **LAMBDAS, **TWO_STEPS)
    held(trainer, Oracle(trainer, folder), 1)


def tool_mask(made):
    """Every third token is a tool's."""
    mask = torch.arange(made["completion_ids"].shape[1]) % 3 != 1
    made["tool_mask"] = mask.int().expand_as(made["completion_mask"]).clone()
    made["num_items_in_batch"] = (made["tool_mask"] * made["completion_mask"]).sum()


def by_token(made):
    generator = torch.Generator().manual_seed(0)
    mask = made["completion_mask"].bool()
    drawn = 0.5 + torch.rand(mask.shape, generator=generator)
    made["importance_sampling_ratio"] = torch.where(mask, drawn, 1.0)


def by_sequence(made):
    by_token(made)
    made["importance_sampling_ratio"] = made["importance_sampling_ratio"][:, :1].clone()


SECOND = {**TWO_STEPS, "number": 1}
OPTIONS = {
    "reference": {"beta": 0.4, **SECOND},
    "reference, plain k3; temperature; clean/view": {
        "beta": 0.4,
        "use_bias_correction_kl": False,
        "temperature": 0.7,
        "penalty_ratio": "clean/view",
        **SECOND,
    },
    "tool mask": {"alter": tool_mask},
    "sampler by sequence; clips of its own": {
        "alter": by_sequence,
        "loss_type": "grpo",
        "clip_low": 0.1,
        "clip_high": 0.15,
        "dual_clip": 1.2,
        **SECOND,
    },
    "sampler, vespo": {"alter": by_token, "loss_type": "vespo", **SECOND},
    "sequence ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo", **SECOND},
    "sequence ratios, luspo": {
        "importance_sampling_level": "sequence",
        "loss_type": "luspo",
        **SECOND,
    },
    "two steps a generation": {
        "steps_per_generation": 4,
        "max_steps": 2,
        "number": 1,
        "penalty_over": "correct",
    },
    "a step a micro-batch": {
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "number": 1,
        "penalty_over": "correct",
    },
    "correct; TRL's head": {"penalty_over": "correct", "roma_lm_head": False},
    "token; no auxiliary loss": {"worst_over": "token", "num_views": 3, "lambda_aux": 0.0},
    "batch; another pool": {
        "worst_over": "batch",
        "num_views": 3,
        "view_pool": "unseen",
        "view_strength": "strong",
        "view_seed": 7,
    },
    "mean; on policy, grpo": {"worst_over": "mean", "num_views": 3, "loss_type": "grpo"},
    "delta": {"delta": 1.5, "epsilon_high": 0.28, "loss_type": "grpo", **SECOND},
    "no penalty; entropy bonus": {"lambda_inv": 0.0, "entropy_coef": 0.3, "loss_type": "dr_grpo"},
    "truncated; checkpointing": {
        "mask_truncated_completions": True,
        "gradient_checkpointing": True,
        "loss_type": "grpo",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(folder, tmp_path, name):
    how = {**LAMBDAS, **OPTIONS[name]}
    number = how.pop("number", 0)
    alter = {"alter": how.pop("alter", None)}
    trainer = small.run(folder, tmp_path, given=alter, **how)
    held(trainer, Oracle(trainer, folder), number)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A run with an old policy, a tool mask and a sampler's weights, and its bounds."""

    def alter(made):
        tool_mask(made)
        by_token(made)

    out = tmp_path_factory.mktemp("plain")
    trainer = small.run(
        folder, out, given={"alter": alter}, loss_type="dapo", **LAMBDAS, **TWO_STEPS
    )
    return trainer, held(trainer, Oracle(trainer, folder), 1)


@pytest.mark.parametrize(
    "plant",
    [
        "view",
        "right",
        "direction",
        "accumulation",
        "aux view",
        "advantages",
        "tokens",
        "clean side",
        "old",
        "weight",
        "tool mask",
    ],
)
def test_a_planted_error_is_refused(folder, plain, plant):
    trainer, bounds = plain
    wrong = Oracle(trainer, folder, plant).gradient(1)
    got = trainer.steps[1].gradients
    for part, bound in bounds.items():
        off = (vector(got, part) - vector(wrong, part)).abs()
        assert off.max() > PLANTED * bound.largest, part
        assert off.mean() > PLANTED * bound.mean, part


def test_lean_runs_fewer_rows_and_has_the_gradient_of_all(folder, tmp_path):
    runs, rows = {}, {}
    for update in ("lean", "joint"):
        trainer = small.build(folder, tmp_path, view_update=update, **LAMBDAS)
        sizes: list[int] = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, given, sizes=sizes: (
                sizes.append(len(given["input_ids"])) if given.get("fused_lm_head") else None
            ),
            with_kwargs=True,
        )
        trainer.train()
        runs[update], rows[update] = trainer, sizes
    assert rows["joint"] == [12, 12] and sum(rows["lean"]) < 24
    first, second = (runs[update].steps[0] for update in ("lean", "joint"))
    assert torch.equal(first.batches[0]["completion_ids"], second.batches[0]["completion_ids"])
    bounds = held(runs["joint"], Oracle(runs["joint"], folder))
    for part, bound in bounds.items():
        off = vector(first.gradients, part) - vector(second.gradients, part)
        assert off.abs().max() <= 2 * bound.largest  # each of them is that far off


def test_views_that_are_the_image_itself_have_no_penalty(folder, tmp_path):
    """At this level every corruption of the pool rounds to the image (JPEG of "seen" does not)."""
    identity = {"view_pool": "unseen", "view_max_level": 1e-6, "view_update": "joint"}
    trainer = small.run(folder, tmp_path, lambda_inv=1.7, lambda_aux=0.0, **identity)
    log = trainer.state.log_history[0]
    assert log["roma/correct"] > 0
    assert log["roma/penalty_worst"] == 0
    # Nor has the gradient a part of it: it is that of the clean objective.
    held(trainer, Oracle(trainer, folder))
