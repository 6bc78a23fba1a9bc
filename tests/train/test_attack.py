"""PGD views: within the ball, stronger than noise, made without a gradient of a weight."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_model
from support.small_run import config

from roma import RomaConfig
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch
from roma.train.config import load_config
from roma.train.config.views import AttackConfig
from roma.train.scoring import Scorer
from roma.train.trainer import Trainer, train
from roma.train.views import ViewMaker
from roma.train.views.attack import Attacked, perturb
from roma.train.views.probe import Probe
from roma.views import sample_attacks, seed_for

GROUP = 3
NEEDED = ["data.train_files=data", "worker.actor.model_path=model"]
VIEWS = "algorithm.views."


@lru_cache(maxsize=1)
def sighted() -> Policy:
    """Weights ten times those of a fresh model, which hardly sees its image."""
    policy = small_model.policy()
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight *= 10
    return policy


def batch_of(policy: Policy, prompts: PromptBatch) -> UpdateBatch:
    """Three rollouts of up to four tokens for each prompt; of the first prompt two are equal."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(len(prompts.images)).repeat_interleave(GROUP)
    tokens = torch.randint(9, 20, (len(group), 4), generator=generator)
    mask = torch.arange(4) < torch.randint(1, 5, (len(group), 1), generator=generator)
    tokens[1], mask[1] = tokens[0], mask[0]
    return UpdateBatch(
        prompts=prompts,
        view_pixels=[],
        group=group,
        tokens=tokens,
        mask=mask,
        advantages=torch.zeros(len(group)),
        correct=torch.zeros(len(group), dtype=torch.bool),
        aux_view=None,
        old_logp=None,
    )


RIGHT = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


def probe_of(policy: Policy, *, views: int = 1, share: bool = True, limit: int | None = None):
    """Three prompts with one, two and one image; the second has no right rollout."""
    batch = batch_of(policy, small_model.mixed_prompts(policy))
    scorer = Scorer(policy, RomaConfig(), share_prompt=share)
    return Probe(scorer, batch, RIGHT, views=views, limit=limit)


def seeds(view: int, prompt: int, number: int) -> int:
    return seed_for(0, view, prompt, number)


def log_probs(policy: Policy, prompts: PromptBatch, pixels: torch.Tensor, batch: UpdateBatch):
    """[B, T] in the policy's own dtype: transformers' forward on a row per completion."""
    found = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, prompt in enumerate(batch.group.tolist()):
        one = prompts.select([prompt])
        start = one.input_ids.shape[1] - prompts.lengths[prompt]
        length = int(batch.mask[row].sum())
        own = batch.tokens[row, :length]
        ids = torch.cat([one.input_ids[0, start:], own])[None]
        given_pixels = pixels[prompts.patches(prompt)]
        logits = policy.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=given_pixels,
            image_grid_thw=one.grids,
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
        ).logits[0, -length - 1 : -1]
        logp = logits.double().log_softmax(-1).gather(1, own[:, None])[:, 0]
        found[row, :length] = logp
    return found


def divergences(policy: Policy, prompts: PromptBatch, pixels: torch.Tensor, batch: UpdateBatch):
    """[P] float64: D = mean_t (e^δ − 1 − δ), δ = view − clean (MATH.md section 2), as counted."""
    with torch.no_grad():
        clean = log_probs(policy, prompts, prompts.pixel_values, batch)
    gap = log_probs(policy, prompts, pixels, batch) - clean
    each = (gap.exp() - 1 - gap).sum(1) / batch.mask.sum(1)
    counted = torch.where(RIGHT.any(1, keepdim=True), RIGHT, ~RIGHT).double()
    return (each.view(-1, GROUP) * counted).sum(1) / counted.sum(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return sighted()


@pytest.mark.parametrize("share", [True, False], ids=["shared", "rows"])
def test_divergence_and_its_gradient_are_those_of_the_formula(policy: Policy, share: bool) -> None:
    """Of two views: against transformers' forward and autograd, and against finite differences.

    Both sides are fp32 passes, whose sums of some thousand products err by √n·2⁻²⁴ ≈ 4e-6 of their
    size; 1e-3 leaves room for what 10-fold weights amplify. Along the gradient g itself a central
    difference is |g| but for the square of its step, and the noise of f over it.
    """
    views = 2
    probe = probe_of(policy, views=views, share=share)
    prompts, batch = probe.batch.prompts, probe.batch
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(prompts.pixel_values.shape, generator=generator) for _ in range(views)]
    pixels = [prompts.pixel_values + 0.1 * own for own in noise]
    found, grads = probe.gradient(pixels)
    torch.testing.assert_close(found, probe.divergence(pixels), rtol=1e-4, atol=1e-7)
    for view in range(views):
        leaf = pixels[view].clone().requires_grad_()
        want = divergences(policy, prompts, leaf, batch)
        torch.testing.assert_close(found[view].double(), want.detach(), rtol=1e-3, atol=1e-6)
        (wanted,) = torch.autograd.grad(want.sum(), leaf)
        bound = 1e-3 * float(wanted.abs().max())
        assert float((grads[view] - wanted).abs().max()) < bound
        assert float((1.01 * grads[view] - wanted).abs().max()) > bound
    size, step = float(grads[0].norm()), 1e-2
    ends = []
    for sign in (1, -1):
        moved = [pixels[0] + sign * step * grads[0] / size, pixels[1]]
        ends.append(float(probe.divergence(moved)[0].double().sum()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(size, rel=0.02)


def test_no_weight_has_a_gradient_or_loses_its_wish_for_one(policy: Policy) -> None:
    """During the pass nothing but the pixels asks for one: so that none is formed."""
    asked = {name: weight.requires_grad for name, weight in policy.named_parameters()}
    probe, seen = probe_of(policy), []
    values = probe._values

    def watched(part, pixels):
        seen.append([weight.requires_grad for weight in policy.parameters()])
        return values(part, pixels)

    probe._values = watched  # type: ignore[method-assign]
    probe.gradient([probe.batch.prompts.pixel_values + 0.1])
    assert any(asked.values()) and seen and not any(any(own) for own in seen)
    assert {name: weight.requires_grad for name, weight in policy.named_parameters()} == asked
    assert all(weight.grad is None for weight in policy.parameters())


def largest(probe: Probe, made: Attacked) -> list[list[int]]:
    """[K][P]: the largest change of a value, levels; each image valid, of the clean one's size."""
    found = []
    for images in made.images:
        own = []
        for clean, view in zip(probe.batch.prompts.images, images, strict=True):
            pairs = list(zip(view, clean, strict=True))
            assert all(x.dtype == np.uint8 and x.shape == y.shape for x, y in pairs)
            own.append(max(int(abs(x.astype(int) - y).max()) for x, y in pairs))
        found.append(own)
    return found


@settings(max_examples=5)
@given(
    st.sampled_from((0.0, 0.5, 1.0, 2.7, 16.0, 255.0)),
    st.sampled_from((None, 0.3, 100.0)),
    st.sampled_from((1, 2)),
)
def test_a_view_stays_in_its_ball(eps: float, step_size: float | None, steps: int) -> None:
    """Of each prompt its own ball; below a whole level a view is the image."""
    probe = probe_of(sighted(), views=2)
    options = AttackConfig(steps=steps, step_size=step_size)
    bounds = [[eps, 1.0, 255.0], [2.0, eps, eps]]
    made = perturb(probe, bounds, seeds, options)
    for own, allowed in zip(largest(probe, made), bounds, strict=True):
        for change, bound in zip(own, allowed, strict=True):
            assert change <= bound and (change > 0) == (bound >= 1)


def test_an_attack_is_worse_than_noise_of_its_size(policy: Policy) -> None:
    """What it says of its images is true, and each prompt's is above five draws of ±ε."""
    probe = probe_of(policy)
    prompts = probe.batch.prompts
    made = perturb(probe, [[4.0] * 3], seeds, AttackConfig())
    pixels = policy.view_pixels(prompts, made.images[0])
    torch.testing.assert_close(probe.divergence([pixels]), made.divergence, rtol=1e-4, atol=1e-7)
    for draw in range(5):
        rng = np.random.default_rng(draw)
        noise = [
            [(x + rng.choice([-4, 4], x.shape)).clip(0, 255).astype(np.uint8) for x in own]
            for own in prompts.images
        ]
        plain = probe.divergence([policy.view_pixels(prompts, noise)])
        assert (made.divergence > plain).all() and (plain > 0).all()


def test_more_steps_find_more(policy: Policy) -> None:
    """Of equal starts, the first of which hardly moves."""
    found = [
        float(perturb(probe_of(policy), [[4.0] * 3], seeds, options).divergence.sum())
        for options in (
            AttackConfig(steps=1, step_size=1e-9),
            AttackConfig(),
            AttackConfig(steps=8),
        )
    ]
    assert found[0] < found[1] < found[2]


def test_a_view_depends_on_its_own_prompt_and_seed_alone(policy: Policy) -> None:
    """One call for all prompts, or one for each; two views at once, or one after the other."""
    both = perturb(probe_of(policy, views=2), [[4.0] * 3] * 2, seeds, AttackConfig())
    cut = perturb(probe_of(policy, views=2, limit=1), [[4.0] * 3] * 2, seeds, AttackConfig())
    second = perturb(
        probe_of(policy), [[4.0] * 3], lambda view, p, n: seeds(1, p, n), AttackConfig()
    )

    def flat(images) -> list[np.ndarray]:
        return [image for column in images for own in column for image in own]

    for found, want in ((cut.images, both.images), (second.images, both.images[1:])):
        for x, y in zip(flat(found), flat(want), strict=True):
            # A gradient that is 0 but for rounding may point either way.
            assert (x != y).mean() < 1e-3
    first, other = (flat([column]) for column in both.images)
    assert all((x != y).mean() > 0.1 for x, y in zip(first, other, strict=True))


def test_the_patches_in_the_loop_are_the_processors(policy: Policy) -> None:
    """Bit for bit; and gradients by images are their transpose: ⟨Aᵀd, x⟩ = ⟨d, Ax⟩."""
    processor, prompts = policy.processor, small_model.mixed_prompts(policy)
    images = [torch.from_numpy(image) for own in prompts.images for image in own]
    assert torch.equal(processor.patches(images), prompts.pixel_values)
    generator = torch.Generator().manual_seed(0)
    dpatches = torch.randn(prompts.pixel_values.shape, generator=generator)
    found = processor.image_gradients(dpatches, prompts.grids)
    assert [x.shape for x in found] == [x.shape for x in images]
    other = [x.flip(0).contiguous() for x in images]
    moved = (processor.patches(other) - processor.patches(images)).double()
    std = torch.tensor(processor.image_processor.image_std)
    by_image = sum(
        float(((y.double() - x.double()) / (255 * std.double()) * g.double()).sum())
        for x, y, g in zip(images, other, found, strict=True)
    )
    assert by_image == pytest.approx(float((dpatches.double() * moved).sum()), rel=1e-4)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "views.jsonl").read_text().splitlines()]


def test_training_on_attacks_goes_on_as_it_began(tmp_path: Path) -> None:
    """A resumed run equals an uninterrupted one bit for bit; views are logged with their ε."""
    options = (f"{VIEWS}pool=adversarial", f"{VIEWS}max_level=4", "trainer.save_freq=1")
    train(config(tmp_path / "whole", *options))
    train(config(tmp_path / "parts", *options, "trainer.total_steps=1"))
    train(config(tmp_path / "parts", *options))
    ends = [Policy.load(tmp_path / name / "global_step_2" / "actor") for name in ("whole", "parts")]
    for a, b in zip(*(end.parameters() for end in ends), strict=True):
        assert torch.equal(a, b)
    whole = rows_of(tmp_path / "whole")
    assert whole == rows_of(tmp_path / "parts") and len(whole) == 8
    for row in whole:
        drawn = sample_attacks(2, (0, row["step"], row["id"]), max_level=4)
        assert [view["parameter"] for view in row["views"]] == [spec.parameter for spec in drawn]
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["views/divergence_mean"] > 0 and last["actor/roma_penalty/pgd"] > 0


def test_an_attack_beside_a_view_of_the_pool(tmp_path: Path) -> None:
    """The pool's view stays what it is without one; the attack comes behind it."""
    made = []
    for options in (["attack.count=1"], ["k=1"]):
        trainer = Trainer(config(tmp_path, *(VIEWS + option for option in options)))
        trainer.step = 1
        experience, _ = trainer.collector.collect(trainer.draw(), 1)
        views, late = experience.views.result(), trainer.late_views
        made.append(late.of(experience, views, 1) if late.needed else views)
    both, seen = made
    assert both.specs[:1] == seen.specs and torch.equal(both.pixels[0], seen.pixels[0])
    assert {spec.corruption for spec in both.specs[1]} == {"pgd"} and len(both.pixels) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["pool=adversarial", "candidates=4"], r"candidates: expected null with .*pool=adversar"),
        (["attack.count=1", "candidates=4"], r"candidates: expected null with .*attack\.count=1"),
        (["pool=adversarial", "attack.count=1"], r"attack\.count: expected 0 with .*pool=adv"),
        (["pool=adversarial", "target_divergence=1"], r"target_divergence: expected null with"),
        (["candidates=4", "target_divergence=1"], r"candidates: expected null with .*target_div"),
        (["attack.count=3"], r"attack\.count: expected at most algorithm\.views\.k = 2, got 3"),
        (["attack.count=1", "max_level=0.9"], r"max_level: expected at least 1 with attacks"),
        (["attack.steps=9"], r"attack\.steps: expected 3 without attacked views, got 9"),
        (["attack.step_size=1"], r"attack\.step_size: expected null without attacked views"),
        (["search_steps=9"], r"search_steps: expected 5 without target_divergence, got 9"),
        (["target_divergence=1", "strength=strong"], r"strength: expected uniform with target"),
        (["target_divergence=0"], r"target_divergence: expected a number > 0, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^algorithm\.views\.{message}"):
        load_config(None, [*NEEDED, *(VIEWS + option for option in options)])


@pytest.mark.parametrize("mode", ["none", "rollout", "noisy_rollout", "papo", "dvrp"])
@pytest.mark.parametrize("option", ["pool=adversarial", "attack.count=1", "target_divergence=1"])
def test_other_modes_have_no_views_after_the_rollouts(mode: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"expected .* with algorithm\.view_mode={mode}"):
        load_config(None, [*NEEDED, VIEWS + option, f"algorithm.view_mode={mode}"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["pool=masking"], r"k: expected 1 to 1, the corruptions of 'masking', got 2"),
        (["pool=adversarial", "max_level=6"], r"max_level: expected above 0 and at most 5"),
    ],
)
def test_a_pool_too_small_is_told_before_the_run(options: list[str], message: str) -> None:
    algorithm = load_config(None, [*NEEDED, *(VIEWS + option for option in options)]).algorithm
    with pytest.raises(ValueError, match=rf"^algorithm\.views\.{message}"):
        ViewMaker(algorithm, 0, torch.device("cpu"))
