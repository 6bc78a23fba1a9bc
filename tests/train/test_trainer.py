"""The trainer on a handful of questions: every mode runs, and a resumed run is the same run."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import small_model
from support.small_run import config

from experiments.runner.warm_start import warm_start
from roma.data import load_dataset_rows
from roma.models.qwen_vl import Policy
from roma.rollout.hf import HfSampler
from roma.train.config import load_config
from roma.train.trainer import Trainer, train
from roma.train.update import PolicyLoss
from roma.train.views import ViewMaker, by_corruption, hardest
from roma.views import ViewSpec, degrade_batch, sample, seed_for

CPU = torch.device("cpu")


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])


@pytest.mark.parametrize("mode", ["none", "roma", "rollout"])
def test_every_mode_trains_and_says_what_it_did(mode: str, tmp_path: Path) -> None:
    path = train(config(tmp_path, f"algorithm.view_mode={mode}", "trainer.val_freq=2"))
    assert (path / "actor" / "config.json").is_file()
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    last = lines[-1]
    assert last["actor/grad_norm"] > 0 and 0 < last["rollout/distinct_share"] <= 1
    assert {"reward/overall", "response_length/mean", "timing_s/gen", "actor/ppo_kl"} <= set(last)
    assert 0 <= last["val/accuracy"] <= 1
    assert any("roma" in name for name in last) == (mode == "roma")
    assert (tmp_path / "views.jsonl").is_file() == (mode != "none")
    if mode == "roma":
        shares = [v for name, v in last.items() if name.startswith("actor/roma_worst_view/")]
        assert sum(shares) == pytest.approx(1)
        assert last["actor/roma_aux_loss"] != 0 and last["actor/roma_penalty_worst"] > 0


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """To the bit: sampling, order, views and the auxiliary view depend on seed and step alone."""
    whole = Trainer(config(tmp_path / "whole", "trainer.total_steps=4"))
    whole.fit()
    options = ("trainer.total_steps=4", "trainer.save_freq=2")
    broken = Trainer(config(tmp_path / "broken", *options))
    with pytest.raises(Crash):
        broken.fit(crash_after(2))
    resumed = Trainer(config(tmp_path / "broken", *options))
    assert resumed.step == 2
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    assert [line["step"] for line in logged(tmp_path / "broken")] == [1, 2, 3, 4]


class Crash(Exception):
    """What ends a run between two steps."""


def crash_after(last: int) -> Callable[[int, Any], None]:
    def progress(step: int, _: Any) -> None:
        if step == last:
            raise Crash

    return progress


def test_later_updates_use_old_log_probs(tmp_path: Path) -> None:
    """Two epochs of two mini-batches: the first update moves the policy, so its ratio leaves 1."""
    options = (
        "worker.actor.ppo_epochs=2",
        "worker.actor.mini_batch_size=2",
        "worker.actor.lr=0.01",
    )
    trainer = Trainer(config(tmp_path, *options, "worker.actor.warmup_steps=0"))
    trainer.step = 1
    metrics = trainer.train_step()
    assert abs(metrics["actor/ppo_kl"]) > 1e-4
    assert trainer.engine.version == trainer.config.updates_per_step == 4


def test_a_frozen_vision_tower_stays(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "worker.actor.freeze_vision=true"))
    vision = trainer.policy.model.model.visual
    before = [weight.clone() for weight in vision.parameters()]
    head = trainer.policy.head_weight.clone()
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, vision.parameters(), strict=True))
    assert not torch.equal(head, trainer.policy.head_weight)


def test_autocast_keeps_fp32_weights(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "trainer.dtype=bfloat16"))
    trainer.fit()
    assert {weight.dtype for weight in trainer.policy.parameters()} == {torch.float32}
    assert logged(tmp_path)[-1]["actor/grad_norm"] > 0


def test_views_do_not_depend_on_the_batch() -> None:
    policy, rows = small_model.policy(), load_dataset_rows(small_model.folder() / "data@train")
    examples = [rows[i] for i in range(4)]
    maker = ViewMaker(load_config(None, NEEDED).algorithm, 5, CPU)

    def made(some):
        prompts = policy.encode_prompts([e.problem for e in some], [e.load_images() for e in some])
        return maker.make(policy, prompts, some, 7)

    whole, alone = made(examples), made(examples[2:3])
    patches = len(alone.pixels[0])
    for view in range(2):
        assert alone.specs[view] == [whole.specs[view][2]]
        assert torch.equal(alone.pixels[view], whole.pixels[view][2 * patches : 3 * patches])
    assert all(a.corruption != b.corruption for a, b in zip(*whole.specs, strict=True))
    assert not torch.equal(whole.pixels[0], whole.pixels[1])


def test_a_view_is_what_its_row_of_the_log_says() -> None:
    """Specs, images and patches of a view belong together."""
    policy, rows = small_model.policy(), load_dataset_rows(small_model.folder() / "data@train")
    examples = [rows[i] for i in range(3)]
    prompts = policy.encode_prompts(
        [example.problem for example in examples], [example.load_images() for example in examples]
    )
    views = ViewMaker(load_config(None, NEEDED).algorithm, 5, CPU).make(
        policy, prompts, examples, 7
    )
    for number, images in enumerate(views.images):
        for p, row in enumerate(views.rows(examples)):
            spec = ViewSpec(**row["views"][number])
            assert row["id"] == examples[p].id and spec == views.specs[number][p]
            seed = seed_for(5, 7, examples[p].id, number, 0)
            (expected,) = degrade_batch(prompts.images[p], [spec], [seed])
            assert np.array_equal(images[p][0], expected)
        assert torch.equal(views.pixels[number], policy.view_pixels(prompts, images))


NEEDED = ["data.train_files=data", "worker.actor.model_path=model"]


def test_views_are_recorded(tmp_path: Path) -> None:
    """Every parameter of every view, a line per prompt; a resumed run keeps what it had."""
    options = ("trainer.total_steps=2", "trainer.save_freq=1")
    with pytest.raises(Crash):
        Trainer(config(tmp_path, *options)).fit(crash_after(1))
    Trainer(config(tmp_path, *options)).fit()
    lines = [json.loads(line) for line in (tmp_path / "views.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4
    levels = []
    for line in lines:
        specs = sample("seen", 2, (0, line["step"], line["id"]))
        assert [ViewSpec(**view) for view in line["views"]] == specs
        levels += [spec.level for spec in specs]
    last = logged(tmp_path)[-1]
    assert last["views/level_mean"] == pytest.approx(sum(levels[8:]) / 8)
    assert last["timing_s/make_views"] > 0 and last["timing_s/views"] >= 0


def test_views_are_made_while_the_policy_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other to have begun: one after the other neither would."""
    sampling, degrading = threading.Event(), threading.Event()
    make, sample_group = ViewMaker.make, HfSampler.sample

    def slow_make(*given: Any) -> Any:
        degrading.set()
        assert sampling.wait(60)
        return make(*given)

    def slow_sample(*given: Any, **named: Any) -> Any:
        sampling.set()
        assert degrading.wait(60)
        return sample_group(*given, **named)

    monkeypatch.setattr(ViewMaker, "make", slow_make)
    monkeypatch.setattr(HfSampler, "sample", slow_sample)
    train(config(tmp_path, "trainer.total_steps=1"))


def test_an_error_in_the_views_thread_is_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roma.train.views.maker.degrade_batch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path))


def test_the_curriculum_grows_with_the_step() -> None:
    def levels(*options: str) -> list[float]:
        maker = ViewMaker(load_config(None, [*NEEDED, *options]).algorithm, 0, CPU)
        return [maker.max_level(step) for step in (1, 5, 10, 11, 1000)]

    assert levels() == [2.0] * 5
    options = ("algorithm.views.ramp_steps=10", "algorithm.views.max_level=3")
    assert levels(*options) == pytest.approx([0.3, 1.5, 3.0, 3.0, 3.0])


def test_the_hardest_by_hand() -> None:
    """Three candidates, two prompts × two rollouts; the second prompt has none right."""
    divergence = torch.tensor([[1.0, 9.0, 0.2, 0.4], [2.0, 0.0, 0.5, 0.1], [2.0, 5.0, 0.3, 0.3]])
    right = torch.tensor([[True, False], [False, False]])
    # Prompt 0 by its first rollout: 1, 2, 2. Prompt 1 by both: 0.3, 0.3, 0.3.
    assert hardest(divergence, right, 1) == [[1], [0]]
    assert hardest(divergence, right, 2) == [[1, 2], [0, 1]]
    assert hardest(divergence, right, 3) == [[0, 1, 2]] * 2


def test_the_hardest_candidates_are_kept(tmp_path: Path) -> None:
    """Of four, each prompt's two of largest mean divergence; pixels and specs go together."""
    options = ("algorithm.views.candidates=4", "worker.actor.micro_batch_tokens=100")
    trainer = Trainer(config(tmp_path, *options))
    trainer.step = 1
    experience, _ = trainer.collector.collect(trainer.draw(), trainer.step)
    drawn = experience.views.result()
    chosen = trainer.learner.choose(experience, drawn)
    assert len(drawn.specs) == 4 and len(chosen.specs) == len(chosen.pixels) == 2
    rows = PolicyLoss(trainer.policy, trainer.engine.policy_loss.config, share_prompt=False)
    divergence = rows.divergence(experience.batch(drawn))
    kept = hardest(divergence, experience.rewards["accuracy"].view(4, 4) >= 0.5, 2)
    assert any(places != [0, 1] for places in kept)
    for p, places in enumerate(kept):
        patches = experience.prompts.patches(p)
        for view, place in enumerate(places):
            assert chosen.specs[view][p] == drawn.specs[place][p]
            assert torch.equal(chosen.pixels[view][patches], drawn.pixels[place][patches])
            assert chosen.images[view][p] is drawn.images[place][p]
    metrics = trainer.train_step()
    assert metrics["timing_s/choose_views"] > 0 and metrics["actor/grad_norm"] > 0


def test_by_corruption_by_hand() -> None:
    """Two prompts × two rollouts; view 0 is blur then noise, view 1 noise then jpeg."""
    blur, noise, jpeg = (ViewSpec(name, 1.0) for name in ("blur", "noise", "jpeg"))
    divergence = torch.tensor([[0.1, 0.4, 0.0, 0.2], [0.3, 0.2, 0.1, 0.2]])
    found = by_corruption(divergence, [[blur, noise], [noise, jpeg]])
    assert found["roma_penalty/blur"] == pytest.approx(0.25)
    assert found["roma_penalty/noise"] == pytest.approx((0.3 + 0.2 + 0.0 + 0.2) / 4)
    # Worst: view 1, 0, 1 and, of the tie, 0.
    worst = {name: found[f"roma_worst_view/{name}"] for name in ("blur", "noise", "jpeg")}
    assert worst == {"blur": 0.25, "noise": 0.5, "jpeg": 0.25}


def test_skipped_rows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"images": ["good.png"], "problem": "<image> sum ?", "answer": "3"}
    bad = good | {"images": ["bad.png"]}
    Image.new("RGB", (64, 32)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in (good, bad)))
    Trainer(config(tmp_path / "run", f"data.train_files={rows}", "data.skip_broken=true"))
    assert "skipped" in (told := capsys.readouterr().err) and "row 1" in told
    with pytest.raises(ValueError, match=r"row 1.*image"):
        Trainer(config(tmp_path / "other", f"data.train_files={rows}")).data[1].load_images()


def test_warm_start_learns() -> None:
    """30 steps on 24 questions: the loss of a word out of 37 (3.6 nats) more than halves."""
    policy, losses = small_model.policy(), []
    rows = load_dataset_rows(small_model.folder() / "data@train")
    warm_start(policy, rows, steps=30, batch_size=12, progress=lambda _, loss: losses.append(loss))
    assert losses[0] > 3 and losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="examples: expected at least one"):
        warm_start(policy, [], steps=1)


@pytest.mark.parametrize(
    "options",
    [
        ("worker.actor.update=lean", "worker.actor.micro_batch_tokens=60"),
        ("worker.actor.update=two_pass", "algorithm.aux_view=prompt"),
        ("worker.actor.mini_batch_size=2", "worker.actor.ppo_epochs=2"),
        ("worker.actor.freeze_vision=true",),
    ],
)
def test_every_form_trains_the_same_policy(options: tuple[str, ...], tmp_path: Path) -> None:
    """Two steps, with AdamW: against every rollout on every view, a row each."""
    trained = []
    rows = ("worker.actor.update=joint", "worker.actor.share_prompt=false")
    for name, form in (("form", ()), ("rows", rows), ("off", ("algorithm.roma.lambda_inv=1.1",))):
        trainer = Trainer(config(tmp_path / name, *options, *form))
        trainer.fit()
        trained.append((weights(trainer), logged(tmp_path / name)))
    (found, lines), (expected, by_rows), (wrong, _) = trained
    # AdamW moves a weight by up to lr = 1e-3 an update whatever the gradient's size; where that is
    # next to nothing, rounding decides. At most 2e-5, 8e-9 in the mean were measured; a tenth more
    # of λ moves a weight by 2e-3, and 3e-6 in the mean.
    largest, mean = 1e-4, 1e-7
    assert float((found - expected).abs().max()) <= largest
    assert float((found - expected).abs().mean()) <= mean
    assert float((wrong - expected).abs().max()) > 10 * largest
    assert float((wrong - expected).abs().mean()) > 10 * mean
    for line, other in zip(lines, by_rows, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"actor/ppo_kl"}:
            if name.startswith(("actor/", "reward/")):
                assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_a_prompt_draws_one_auxiliary_view(tmp_path: Path) -> None:
    drawn = {}
    for who in ("rollout", "prompt"):
        trainer = Trainer(config(tmp_path / who, f"algorithm.aux_view={who}"))
        trainer.step = 1
        experience, _ = trainer.collector.collect(trainer.draw(), 1)
        found = trainer.learner._aux_view(experience, experience.views.result(), trainer.step)
        assert found is not None
        drawn[who] = found.view(4, 4)
    assert (drawn["prompt"] == drawn["prompt"][:, :1]).all()
    assert not (drawn["rollout"] == drawn["rollout"][:, :1]).all()


def test_a_model_that_cannot_share_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "shares_prompts", property(lambda self: False))
    trainer = Trainer(config(tmp_path))
    assert not trainer.engine.policy_loss.share_prompt
    told = capsys.readouterr().err.splitlines()
    kind = "Qwen3VLForConditionalGeneration"
    assert told == [f"{kind} cannot share prompts: a row per rollout instead"]
    assert trainer.fit().is_dir()
