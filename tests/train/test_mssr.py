"""MSSR in the trainer: what a run remembers of its questions, keeps in a checkpoint and draws by."""

# ruff: noqa: E501 - one message a line reads best

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_model
from support.small_run import config
from torch import Tensor

from roma.rewards import Failed
from roma.train.trainer import Trainer, train
from roma.train.views import Views

MSSR = ("algorithm.adv_estimator=mssr", "worker.rollout.n=1")


def mssr_by_hand(
    seen: dict[str, tuple[float, float]], ids: list[str], rewards: Tensor, eta: float
) -> Tensor:
    """A whitened, of MATH.md section 4; α and β move, those of a question that comes twice once."""
    raw, before = torch.zeros(len(ids), dtype=torch.float64), dict(seen)
    for i, (own, reward) in enumerate(zip(ids, rewards.tolist(), strict=True)):
        alpha, beta = before.get(own, (4.0, 4.0))
        raw[i] = reward - alpha / (alpha + beta)
        alpha, beta = (eta * x for x in (alpha, beta)) if ids.index(own) == i else seen[own]
        seen[own] = (alpha + reward, beta + 1 - reward)
    variance = ((raw - raw.mean()) ** 2).sum() / len(raw)
    return (raw - raw.mean()) / max(float(variance), 1e-6) ** 0.5


@pytest.mark.parametrize("entropy", ["sampled", "full"])
def test_mssr_compares_with_what_it_remembers(entropy: str, tmp_path: Path) -> None:
    """Four steps; a rollout without a reward is no part of any."""
    options = (*MSSR, f"algorithm.mssr.entropy={entropy}", "data.rollout_batch_size=8")
    trainer = Trainer(config(tmp_path, *options))
    trainer.data_size, calls = 12, 0  # questions come again

    def score(rows: Any) -> Any:
        nonlocal calls
        calls += 1
        right = {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
        wrong = dict.fromkeys(right, 0.0)
        made = [right if (calls + i) % 3 else wrong for i in range(len(rows))]
        return [Failed("none") if i == calls else made[i] for i in range(len(rows))]

    trainer.collector.score = score
    seen: dict[str, tuple[float, float]] = {}
    repeated = False
    for step, eta in enumerate((0.9175, 0.96 - 0.085 * 0.5, 0.96 - 0.085 * 0.75, 0.875), 1):
        trainer.step = step
        experience, metrics = trainer.collector.collect(trainer.draw(), step)
        repeated |= len({example.id for example in experience.examples}) < 8
        kept = ~experience.failed
        ids = [example.id for example in experience.examples]
        before = [seen.get(own, (4.0, 4.0)) for own, on in zip(ids, kept, strict=True) if on]
        base = torch.zeros(8, dtype=torch.float64)
        base[kept] = mssr_by_hand(
            seen,
            [own for own, on in zip(ids, kept, strict=True) if on],
            experience.rewards["overall"][kept],
            eta,
        )
        assert metrics["advantage/mssr_eta"] == pytest.approx(eta)
        value = sum(a / (a + b) for a, b in before) / len(before)
        assert metrics["advantage/mssr_value"] == pytest.approx(value)
        scores = trainer.engine.policy_loss.score(experience.batch(Views.none()), entropy=True)
        full = scores.entropy.double()
        size = full if entropy == "full" else -scores.logp.double() * scores.logp.double().exp()
        want = base[:, None] + torch.minimum(0.4 * size, base.abs()[:, None] / 2)
        want = want.where(experience.rollouts.mask, 0.0)
        torch.testing.assert_close(experience.advantages.double(), want, rtol=0, atol=2e-6)
        other = -scores.logp.double() * scores.logp.double().exp() if entropy == "full" else full
        assert (0.4 * (size - other).abs().where(experience.rollouts.mask, 0)).max() > 1e-2
        trainer.collector.advantages.observe(
            {"actor/ppo_kl": (0.005, 0.01, 0.3, math.nan)[step - 1]}
        )
    assert repeated


def test_without_an_entropy_mssr_scores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(tmp_path, *MSSR, "algorithm.mssr.entropy_coef=0"))
    monkeypatch.setattr(
        type(trainer.engine.policy_loss), "score", lambda *_, **__: pytest.fail("scored")
    )
    trainer.step = 1
    experience, _ = trainer.collector.collect(trainer.draw(), 1)
    assert experience.advantages.ndim == 1


class Crash(Exception):
    """What ends a run between two steps."""


def crash_after(last: int) -> Callable[[int, Any], None]:
    def progress(step: int, _: Any) -> None:
        if step == last:
            raise Crash

    return progress


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])


def test_a_killed_run_goes_on_with_what_it_remembers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Questions drawn by value, and a forgetting that follows the KL of two updates a step."""
    options = (
        *MSSR,
        "algorithm.mssr.prioritised=true",
        "worker.actor.mini_batch_size=2",
        "trainer.total_steps=4",
        "trainer.save_freq=2",
    )
    whole = Trainer(config(tmp_path / "whole", *options))
    whole.fit()
    broken = Trainer(config(tmp_path / "broken", *options))
    with pytest.raises(Crash):
        broken.fit(crash_after(2))
    resumed = Trainer(config(tmp_path / "broken", *options))
    assert resumed.step == 2
    state = resumed.collector.advantages.state_dict()
    assert state == broken.collector.advantages.state_dict()
    assert len(state["mssr"]["kl"]) == 2 and state["mssr"]["kl"][0] != 0
    resumed.fit()
    assert torch.equal(weights(resumed), weights(whole))
    last = whole.collector.advantages.state_dict()
    assert resumed.collector.advantages.state_dict() == last
    # Of other questions.
    start = f"trainer.resume={tmp_path / 'whole' / 'global_step_2'}"
    val = f"data.train_files={small_model.folder() / 'data'}@val"
    with pytest.raises(
        ValueError,
        match=r"data\.train_files: expected the questions whose values the checkpoint tracks \(mssr\), got others; resume on that data",
    ):
        Trainer(config(tmp_path / "other", *options, start, val))
    # And of a run without values.
    capsys.readouterr()
    train(config(tmp_path / "grpo", "trainer.total_steps=1"))
    start = f"trainer.resume={tmp_path / 'grpo' / 'global_step_1'}"
    anew = Trainer(config(tmp_path / "anew", *options, start))
    assert anew.step == 1 and not len(anew.collector.advantages.mssr.tracker)  # type: ignore[union-attr]
    assert "the value of each question begins anew" in capsys.readouterr().err


def test_questions_are_drawn_by_their_values(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, *MSSR, "algorithm.mssr.prioritised=true"))
    mssr = trainer.collector.advantages.mssr
    assert mssr is not None
    ids = [row.id for row in trainer.data]
    # Half of the questions are always answered right: √(v(1 − v)) + 0.05 falls from 0.55.
    for _ in range(30):
        mssr.tracker.advantage(ids[:12], torch.ones(12))
    counts = torch.zeros(24)
    for step in range(1, 201):
        drawn = mssr.draw(step, 4)
        assert len(set(drawn.tolist())) == 4 and torch.equal(drawn, mssr.draw(step, 4))
        counts[drawn] += 1
    value = mssr.tracker.value(ids)
    weight = (value * (1 - value)).sqrt() + 0.05
    # Without replacement the heavier ones are drawn a little less often than by their share; four
    # deviations of a binomial count on top.
    share = float(weight[12:].sum() / weight.sum())
    got = float(counts[12:].sum() / counts.sum())
    assert 0.5 < share - 0.06 < got < share + 4 * (share * (1 - share) / 800) ** 0.5
    trainer.step = 5
    assert [row.id for row in trainer.draw()] == [ids[i] for i in mssr.draw(5, 4).tolist()]
    with pytest.raises(
        ValueError,
        match=r"data\.rollout_batch_size: expected at most the 24 rows with algorithm\.mssr\.prioritised, got 32",
    ):
        Trainer(
            config(tmp_path, *MSSR, "algorithm.mssr.prioritised=true", "data.rollout_batch_size=32")
        )


def test_without_priorities_the_order_is_every_method_s(tmp_path: Path) -> None:
    plain, mssr = Trainer(config(tmp_path)), Trainer(config(tmp_path, *MSSR))
    for step in (1, 5, 8):
        plain.step = mssr.step = step
        assert [row.id for row in plain.draw()] == [row.id for row in mssr.draw()]
