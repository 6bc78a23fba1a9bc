"""MSSR, SRPO, VGPO and NoisyRollout in the trainer: what the pure functions get, and what is kept."""

# ruff: noqa: E501 - one message a line reads best

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_model
from support.engine_run import Fixed
from support.small_run import config
from support.worked_answers import TAGS, Worked
from torch import Tensor

from roma.advantages import grpo, srpo, vgpo
from roma.data import Example
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rollout.base import Rollouts
from roma.train.config.check_methods import scoring_passes
from roma.train.mixed import Mix, level_share
from roma.train.refine import Sampled
from roma.train.refine.srpo import Srpo
from roma.train.trainer import Trainer

MSSR = ("algorithm.adv_estimator=mssr", "worker.rollout.n=1")
SRPO = ("algorithm.reweight=srpo", *TAGS)
SHARP = 3.0  # default weights hardly let the image through


def sharp(policy: Policy) -> None:
    """Lets the answers depend on the image."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(SHARP)


@pytest.fixture(scope="module")
def exact() -> Policy:
    """The model in float64."""
    policy = Policy.load(small_model.folder() / "model", dtype=torch.float64).eval()
    sharp(policy)
    return policy


def prompts_of(policy: Policy) -> PromptBatch:
    """One image, two of different grids, one larger, none."""
    mixed = small_model.mixed_prompts(policy)
    problems = ["<image> sum ?", "left <image> right <image> larger ?", "so <image> larger sum ?"]
    return policy.encode_prompts([*problems, "larger sum ?"], [*mixed.images, []])


def states_of(policy: Policy, ids: Tensor, images: list[Any]) -> Tensor:
    """[S, D]: transformers' own forward on one row."""
    kinds = (ids == policy.image_id).int()[None]
    given: dict[str, Any] = {"input_ids": ids[None], "mm_token_type_ids": kinds}
    if images:
        pixels, grids = policy.processor.pixel_values(images)
        given |= {"pixel_values": pixels.to(policy.head_weight.dtype), "image_grid_thw": grids}
    policy.model.model.rope_deltas = None
    found: Tensor = policy.model.model(**given).last_hidden_state[0]
    return found


def plain_row(prompts: PromptBatch, prompt: int, answer: Tensor) -> tuple[Tensor, int]:
    """The ids of a prompt without padding and its answer, and the length of the prompt."""
    own = prompts.input_ids[prompt, -prompts.lengths[prompt] :]
    return torch.cat([own, answer]), len(own)


@torch.no_grad()
def logp_of(policy: Policy, prompts: PromptBatch, prompt: int, answer: Tensor) -> Tensor:
    """[n] nats of the tokens of one answer."""
    ids, start = plain_row(prompts, prompt, answer)
    states = states_of(policy, ids, prompts.images[prompt])[start - 1 : -1]
    scores = (states @ policy.head_weight.T).log_softmax(-1)
    return scores.gather(-1, answer[:, None])[:, 0]


def sampled_of(trainer: Trainer, rollouts: Rollouts, prompts: PromptBatch, **more: Any) -> Sampled:
    """Rollouts with the rewards 1, 0, 1, 1, 0, 0, 1, … and none without."""
    group = torch.arange(len(prompts.images)).repeat_interleave(
        len(rollouts.tokens) // len(prompts.images)
    )
    overall = (torch.arange(len(group)) % 5).remainder(2).float()
    rewards = {"overall": overall, "accuracy": overall, "failed": torch.zeros(len(group))}
    examples = [Example(str(p), (), "?", "1") for p in range(len(prompts.images))]
    given: dict[str, Any] = {"step": 1, "examples": examples, "prompts": prompts}
    given |= {"rollouts": rollouts, "group": group, "rewards": rewards} | more
    return Sampled(**given)


@pytest.mark.parametrize("share", [True, False])
def test_vgpo_reads_the_states_of_tokens_and_images(
    share: bool, exact: Policy, tmp_path: Path
) -> None:
    options = ("algorithm.reweight=vgpo", f"worker.actor.share_prompt={share}")
    trainer = Trainer(config(tmp_path, *options))
    sharp(trainer.policy)
    prompts = prompts_of(trainer.policy)
    rollouts = Fixed(0).sample(prompts, group_size=3, max_new_tokens=6)
    sampled = sampled_of(trainer, rollouts, prompts)
    found, metrics = trainer.collector.advantages(sampled)
    width = exact.head_weight.shape[1]
    hidden = torch.zeros(*rollouts.mask.shape, width, dtype=torch.float64)
    image = torch.zeros(len(rollouts.mask), width, dtype=torch.float64)
    text = image.clone()
    for row, prompt in enumerate(sampled.group.tolist()):
        answer = rollouts.tokens[row][rollouts.mask[row]]
        ids, start = plain_row(prompts, prompt, answer)
        with torch.no_grad():
            states = states_of(exact, ids, prompts.images[prompt])
        hidden[row, : len(answer)] = states[start - 1 : -1]
        seen = ids[:start] == exact.image_id
        if seen.any():
            image[row], text[row] = states[:start][seen].mean(0), states[:start][~seen].mean(0)
    rest = (hidden, image, rollouts.mask, sampled.group)
    want = vgpo.reweight(grpo(sampled.rewards["overall"], sampled.group), *rest)
    # 1e-5 was measured; the group's min and max divide by a range of 0.1.
    torch.testing.assert_close(found, want, rtol=0, atol=2e-4)
    assert torch.equal(found[-3:], want[-3:])  # text alone keeps its A
    wrong = vgpo.reweight(grpo(sampled.rewards["overall"], sampled.group), hidden, text, *rest[2:])
    assert (wrong - want).abs().max() > 0.05
    spread = vgpo.weights(*rest)[rollouts.mask].log().abs().mean()
    assert metrics == {"advantage/log_weight": pytest.approx(float(spread), abs=1e-4)}


def test_vgpo_leaves_a_failed_rollout_out_of_its_group(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "algorithm.reweight=vgpo"))
    sharp(trainer.policy)
    prompts = prompts_of(trainer.policy)
    rollouts = Fixed(0).sample(prompts, group_size=3, max_new_tokens=6)
    sampled = sampled_of(trainer, rollouts, prompts)
    failed = torch.zeros(12)
    failed[2] = 1
    lost = replace(sampled, rewards={**sampled.rewards, "failed": failed})
    found, _ = trainer.collector.advantages(lost)
    left = torch.tensor([0, 1])
    part = {"tokens": rollouts.tokens[left], "mask": rollouts.mask[left]}
    alone = replace(
        sampled,
        prompts=prompts.select([0]),
        rollouts=Rollouts(**part, finished=rollouts.finished[left]),
        group=torch.zeros(2, dtype=torch.int64),
        rewards={name: values[left] for name, values in sampled.rewards.items()},
    )
    want, _ = trainer.collector.advantages(alone)
    torch.testing.assert_close(found[left], want, rtol=0, atol=2e-4)
    assert want.any() and not found[2].any() and found[3:].any(1).all()


@pytest.mark.parametrize("contrast", ["blind", "view"])
def test_srpo_compares_with_black_patches_and_without_what_was_read(
    contrast: str, exact: Policy, tmp_path: Path
) -> None:
    trainer = Trainer(config(tmp_path, *SRPO, f"algorithm.srpo.contrast={contrast}"))
    sharp(trainer.policy)
    prompts = prompts_of(trainer.policy)
    examples = [Example(str(p), (), "?", "1") for p in range(4)]
    masked = trainer.collector.advantages.start(prompts, examples, 1)
    assert masked is not None
    rollouts = Worked(trainer.policy).sample(prompts, group_size=4)
    with torch.no_grad():  # known from the sampling, those of the clean images
        features = trainer.policy.image_features(prompts.pixel_values, prompts.grids)
    rollouts = replace(rollouts, features=features)
    sampled = sampled_of(trainer, rollouts, prompts, masked=masked)
    found, metrics = trainer.collector.advantages(sampled)
    black = masked.result()
    assert all((image == 0).all(-1).mean() > 0.3 for own in black.images[0] for image in own)
    corrupted_prompts = black.applied_to(prompts)
    shape = rollouts.mask.shape
    logp, corrupted, blind = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    roles = torch.full(shape, srpo.NEITHER, dtype=torch.int8)
    words = trainer.policy.processor.tokenizer.convert_tokens_to_ids(["so", "</think>", "<think>"])
    unreadable = 0
    for row, prompt in enumerate(sampled.group.tolist()):
        answer = rollouts.tokens[row][rollouts.mask[row]]
        size = len(answer)
        logp[row, :size] = logp_of(exact, prompts, prompt, answer)
        corrupted[row, :size] = logp_of(exact, corrupted_prompts, prompt, answer)
        so, close, open_ = ((answer == word).nonzero()[:, 0].tolist() for word in words)
        if not (open_ and len(so) == 1):
            unreadable += 1
            continue
        roles[row, 1 : so[0]] = srpo.PERCEPTION
        roles[row, so[0] + 1 : size] = srpo.REASONING
        roles[row, close[0]] = srpo.NEITHER
        short = torch.cat([answer[:1], answer[so[0] :]])  # what was read is not there
        blind[row, so[0] : size] = logp_of(exact, prompts, prompt, short)[1:]
    assert 0 < unreadable < len(shape) * 16
    base = grpo(sampled.rewards["overall"], sampled.group)
    given = (logp, corrupted, blind if contrast == "blind" else None, roles, rollouts.mask)
    want = srpo.reweight(base, *given)
    # |A|·w ≤ 3 times the error of a contrast: two log-probs of logits up to 30, ten roundings of
    # 2e-6 each; 5e-5 was measured.
    torch.testing.assert_close(found, want, rtol=0, atol=1.2e-4)
    assert metrics["advantage/srpo_unparsable"] == unreadable / 16
    # What another contrast, or the clean image in its place, would have given.
    other = (logp, corrupted, None if contrast == "blind" else blind, roles, rollouts.mask)
    for wrong in (other, (logp, logp, *given[2:])):
        assert (srpo.reweight(base, *wrong) - want).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["rollout", "papo"])
def test_srpo_blackens_what_the_policy_saw(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a mode's own degradation, and with a chance that is no option of the mode's."""
    options = ["data.max_response_length=12", f"algorithm.view_mode={mode}"]
    options += ["algorithm.papo.probability=1"] * (mode == "papo")
    trainer = Trainer(config(tmp_path, *SRPO, *options))
    trainer.collector.sampler = Worked(trainer.policy)
    seen: list[Sampled] = []
    whole = Srpo.__call__
    monkeypatch.setattr(Srpo, "__call__", lambda *given: (seen.append(given[1]), whole(*given))[1])
    examples = [trainer.data[row] for row in range(4)]
    trainer.collector.collect(examples, 1)
    assert seen[0].masked is not None
    black = seen[0].masked.result().images[0]
    clean, moved, left = trainer.collector.encode(examples), 0, 0
    for before, own, masked in zip(clean.images, seen[0].prompts.images, black, strict=True):
        for image, sampled_on, view in zip(before, own, masked, strict=True):
            on = (view != 0).any(-1)
            assert (view[on] == sampled_on[on]).all()
            left, moved = left + on.sum(), moved + (sampled_on != image).sum()
    assert left > 0 and (moved > 0) == (mode == "rollout")


def test_the_reasoning_that_a_template_opens_is_found(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, *SRPO))
    processor = trainer.policy.processor
    rollouts = Worked(trainer.policy).sample(prompts_of(trainer.policy), group_size=4)
    weights = trainer.collector.advantages.weights
    closed = weights.roles(rollouts)  # type: ignore[union-attr]  # SRPO's
    processor._opening = "<think>"
    opened = weights.roles(rollouts)  # type: ignore[union-attr]
    readable = ~closed.unparsable
    assert readable.any() and opened.unparsable[readable].all()  # <think> twice
    third = [
        row for row, text in enumerate(processor.decode(rollouts.tokens, rollouts.mask))
        if text.startswith("<think>left")
    ]  # fmt: skip
    assert third and not opened.unparsable[third].any()
    assert (opened.roles[third, :2] == srpo.PERCEPTION).all()


def test_tags_that_no_response_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step stops; a later one says so once."""
    trainer = Trainer(config(tmp_path, *SRPO))
    trainer.collector.sampler = Worked(trainer.policy, first=None)
    message = r"algorithm\.reweight=srpo: expected responses with one <think> … so and one so … </think>, got none of 16 in step 1; ask for the tags in the prompt \(data\.format_prompt\)"
    with pytest.raises(ValueError, match=message):
        trainer.collector.collect(trainer.data[:4], 1)
    for step in (7, 8):
        experience, metrics = trainer.collector.collect(trainer.data[:4], step)
        assert metrics["advantage/srpo_unparsable"] == 1 and metrics["advantage/log_weight"] == 0
    base = grpo(experience.rewards["overall"], experience.group)[:, None]
    assert torch.equal(experience.advantages, base * experience.rollouts.mask)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "srpo" in line)
    assert line.startswith("warning: step 7: ") and "\n" not in line


@pytest.mark.parametrize("method", ["srpo", "vgpo"])
def test_questions_without_images_have_nothing_to_weigh_by(method: str, tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, f"algorithm.reweight={method}", *TAGS * (method == "srpo")))
    trainer.collector.sampler = Worked(trainer.policy)
    rows = [replace(row, images=(), problem="sum ?") for row in trainer.data[:4]]
    with pytest.raises(
        ValueError,
        match=rf"algorithm\.reweight: expected questions with images for {method}, got a first step without any",
    ):
        trainer.collector.collect(rows, 1)
    trainer.collector.collect(rows, 2)  # by chance, among others


class Recorder:
    """Answers of one, then of two tokens, and what was asked."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.calls: list[tuple[PromptBatch, dict[str, Any]]] = []

    def sample(self, prompts: PromptBatch, **options: Any) -> Rollouts:
        """As `Sampler` has it."""
        self.calls.append((prompts, options))
        rows, width = len(prompts.images) * options["group_size"], len(self.calls)
        tokens = torch.arange(rows)[:, None].repeat(1, width) + 9 + 3 * width
        mask = torch.ones_like(tokens, dtype=torch.bool)
        with torch.no_grad():
            features = self.policy.image_features(prompts.pixel_values, prompts.grids)
        logp = torch.full(tokens.shape, -1.0)
        return Rollouts(tokens.clamp(max=30), mask, mask[:, 0], logp, features)


def test_some_rollouts_see_the_noisy_image(tmp_path: Path) -> None:
    options = (
        "algorithm.view_mode=noisy_rollout",
        "algorithm.noisy_rollout.noisy=1",
        "worker.rollout.n=3",
        "worker.actor.freeze_vision=true",
    )
    trainer = Trainer(config(tmp_path, *options))
    trainer.collector.sampler = sampler = Recorder(trainer.policy)
    examples = trainer.data[:4]
    experience, metrics = trainer.collector.collect(examples, 1)
    (clean, first), (noisy, second) = sampler.calls
    assert (first["group_size"], second["group_size"]) == (2, 1)
    assert first["seed"] != second["seed"]
    assert torch.equal(noisy.pixel_values, experience.views.result().pixels[0])
    assert not torch.equal(noisy.pixel_values, clean.pixel_values)
    assert torch.equal(experience.prompts.pixel_values, clean.pixel_values)
    rows = experience.rollouts.tokens.view(4, 3, 2)
    assert rows[:, :2, 0].flatten().tolist() == [12, 13, 14, 15, 16, 17, 18, 19]
    assert rows[:, 2].tolist() == [[15, 15], [16, 16], [17, 17], [18, 18]]
    assert experience.rollouts.mask.sum(-1).tolist() == [1, 1, 2] * 4
    assert experience.rollouts.logp is None and experience.rollouts.features is not None
    kept = torch.cat(experience.rollouts.features.embeddings)
    own = trainer.policy.image_features(clean.pixel_values, clean.grids)
    assert torch.equal(kept, torch.cat(own.embeddings))
    assert experience.noisy is not None and experience.noisy.tolist() == [False, False, True] * 4
    # One group of three; the sampler's kinds are told apart in the rewards alone.
    rewards = experience.rewards["overall"]
    assert torch.equal(experience.advantages, grpo(rewards, experience.group))
    for kind, own in (("clean", rewards.view(4, 3)[:, :2]), ("noisy", rewards.view(4, 3)[:, 2])):
        assert metrics[f"reward/overall/{kind}"] == pytest.approx(float(own.mean()))
    # The loss is that of the clean images, without views.
    right = {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
    trainer.collector.score = lambda rows: [right | {"overall": i % 2} for i in range(len(rows))]
    trainer.step = 1
    step = trainer.train_step()
    assert step["actor/grad_norm"] > 0 and not any("roma_penalty" in name for name in step)


def test_the_noise_goes_as_the_run_goes(tmp_path: Path) -> None:
    options = ("algorithm.view_mode=noisy_rollout", "trainer.total_steps=60", "worker.rollout.n=5")
    chosen = config(tmp_path, *options)
    levels = [level_share(chosen, step) for step in (1, 38, 40, 42, 60)]
    want = [1 - 1 / (1 + math.exp(-30 * (t - 40) / 60)) for t in (1, 38, 40, 42, 60)]
    assert levels == pytest.approx(want) and Mix.of(chosen) == Mix(3, 2)
    trainer = Trainer(chosen)
    assert trainer.view_maker.max_level(40) == pytest.approx(2.0 * 0.5)
    still = config(tmp_path, *options, "algorithm.noisy_rollout.anneal=false")
    assert level_share(still, 60) == 1


REFUSED = {
    "worker.rollout.n=1": "worker.rollout.n: expected at least 2 with grpo, got 1; A is 0 for every rollout: raise it, or take algorithm.adv_estimator=mssr",
    "worker.rollout.n=1 algorithm.adv_estimator=dr_grpo": "at least 2 with dr_grpo",
    "algorithm.adv_estimator=mssr": "worker.rollout.n: expected 1 with algorithm.adv_estimator=mssr, got 4; set it to 1",
    "worker.rollout.n=1 algorithm.view_mode=noisy_rollout": "got 1; A is 0 for every rollout: raise it",
    "algorithm.mssr.prioritised=true": "algorithm.mssr.prioritised: expected false without algorithm.adv_estimator=mssr, got true; it does nothing there",
    "algorithm.srpo.tau=2": "algorithm.srpo.tau: expected 1.0 without algorithm.reweight=srpo",
    "algorithm.vgpo.beta=1 algorithm.reweight=srpo": "algorithm.vgpo.beta: expected 0.3 without algorithm.reweight=vgpo",
    "algorithm.noisy_rollout.noisy=1": "algorithm.noisy_rollout.noisy: expected null without algorithm.view_mode=noisy_rollout",
    "algorithm.view_mode=noisy_rollout algorithm.noisy_rollout.noisy=4": "algorithm.noisy_rollout.noisy: expected less than worker.rollout.n = 4, got 4",
    "algorithm.view_mode=noisy_rollout algorithm.adv_estimator=mssr worker.rollout.n=1": "algorithm.adv_estimator: expected grpo, dr_grpo or rloo with algorithm.view_mode=noisy_rollout",
    "algorithm.view_mode=noisy_rollout worker.rollout.weight=truncate": "worker.rollout.weight: expected none with algorithm.view_mode=noisy_rollout",
    "algorithm.reweight=srpo algorithm.srpo.perception_tag=[a,a]": "algorithm.srpo.perception_tag: expected two different texts, none empty",
    "algorithm.reweight=srpo algorithm.srpo.perception_tag=[<think>,so]": "algorithm.srpo.reasoning_tag: expected a tag that opens otherwise than perception_tag",
    "algorithm.reweight=vgpo algorithm.vgpo.kappa=0": "algorithm.vgpo.kappa: expected a number > 0 and ≤ 1",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_go_together(options: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(Path("nowhere"), *options.split())
    assert REFUSED[options] in str(caught.value) and "\n" not in str(caught.value)


ON = {  # and the passes that score its rollouts
    "mssr": (MSSR, 1),
    "srpo": (SRPO, 3),
    "vgpo": (("algorithm.reweight=vgpo",), 1),
    "mssr and srpo": ((*MSSR, *SRPO, "algorithm.srpo.contrast=view"), 2),
    "mssr and vgpo": ((*MSSR, "algorithm.reweight=vgpo"), 1),
}


@pytest.mark.parametrize("mode", ["none", "roma"])
@pytest.mark.parametrize("method", ON)
def test_one_line_switches_a_method_on(
    method: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, passes = ON[method]
    trainer = Trainer(config(tmp_path, *options, f"algorithm.view_mode={mode}"))
    trainer.collector.sampler = Worked(trainer.policy)
    loss, calls = type(trainer.engine.policy_loss), []
    score = loss.score
    monkeypatch.setattr(loss, "score", lambda *a, **b: (calls.append(1), score(*a, **b))[1])
    trainer.step = 1
    metrics = trainer.train_step()
    assert metrics["actor/grad_norm"] > 0
    assert any("roma" in name for name in metrics) == (mode == "roma")
    assert len(calls) == passes == scoring_passes(trainer.config.algorithm)
