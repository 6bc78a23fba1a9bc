"""What the trainer makes of log-probs that a sampler reports: weights of tokens, and who is out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_run import config

from roma.train.batch import UpdateBatch
from roma.train.collect import Experience
from roma.train.learner import Learner
from roma.train.trainer import Trainer
from roma.train.views import Views

CAP = 1.5


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    out = tmp_path_factory.mktemp("run")
    return Trainer(config(out, "algorithm.view_mode=none", f"worker.rollout.weight_cap={CAP}"))


@pytest.fixture(scope="module")
def experience(trainer: Trainer) -> Experience:
    """Sixteen rollouts; the sampler's log-probs are off by up to a nat, one is not known."""
    trainer.step = 1
    found, _ = trainer.collector.collect(trainer.draw(), 1)
    logp = trainer.learner._score(found.batch(Views.none()))
    generator = torch.Generator().manual_seed(2)
    sampled = logp + torch.randn(logp.shape, generator=generator)
    sampled[0, 0] = torch.nan
    advantages = torch.randn(len(logp), generator=generator)
    return replace(found, advantages=advantages, rollouts=replace(found.rollouts, logp=sampled))


def corrected(
    trainer: Trainer, experience: Experience, main: str = "grpo", **options: object
) -> tuple[UpdateBatch, dict[str, float]]:
    whole = trainer.config
    rollout = replace(whole.worker.rollout, **options)
    roma = replace(whole.algorithm.roma, main=main)
    changed = replace(
        whole,
        worker=replace(whole.worker, rollout=rollout),
        algorithm=replace(whole.algorithm, roma=roma),
    )
    learner = Learner(changed, trainer.engine)
    return learner._corrected(experience.batch(Views.none()), experience)


def ratios(trainer: Trainer, experience: Experience) -> torch.Tensor:
    """log ρ [B, T], 0 where nothing is known or counted."""
    logp = trainer.learner._score(experience.batch(Views.none())).double()
    assert experience.rollouts.logp is not None
    known = experience.rollouts.mask & ~experience.rollouts.logp.isnan()
    return (logp - experience.rollouts.logp.double()).where(known, 0.0)


def test_without_a_weight_nothing_changes(trainer: Trainer, experience: Experience) -> None:
    batch, metrics = corrected(trainer, experience)
    assert batch.rollout_weight is None and torch.equal(batch.advantages, experience.advantages)
    assert batch.old_logp is not None and "rollout/off_policy_share" not in metrics
    assert metrics["rollout/weight_clipped_share"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", ["truncate", "mask"])
@pytest.mark.parametrize("main", ["grpo", "vespo"])
def test_weights_are_the_loss_s_and_a_weight_of_0_has_no_advantage(
    trainer: Trainer, experience: Experience, how: str, level: str, main: str
) -> None:
    log_ratio, mask = ratios(trainer, experience), experience.rollouts.mask
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand(mask.shape)
    ratio = log_ratio.exp()
    outside = (ratio > CAP) | ((ratio < 1 / CAP) & (how == "mask"))
    expected = ratio.clamp(max=CAP) if how == "truncate" else ratio.masked_fill(outside, 0)
    batch, metrics = corrected(trainer, experience, main, weight=how, weight_level=level)
    assert batch.rollout_weight is not None
    torch.testing.assert_close(
        batch.rollout_weight.double()[mask], expected[mask], rtol=1e-5, atol=0
    )
    missing = torch.isnan(experience.rollouts.logp)  # type: ignore[arg-type]  # it is there
    share = float(((outside | missing) & mask).sum() / mask.sum())
    assert metrics["rollout/weight_clipped_share"] == pytest.approx(share)
    advantages = batch.advantages
    if how == "mask" and main == "grpo":
        given = experience.advantages[:, None].where(batch.rollout_weight > 0, 0)
        assert torch.equal(advantages, given) and (advantages == 0).any()
    else:
        assert torch.equal(advantages, experience.advantages)


@pytest.mark.parametrize("by_token", [False, True])
def test_rollouts_off_the_policy_are_left_out(
    trainer: Trainer, experience: Experience, by_token: bool
) -> None:
    mask = experience.rollouts.mask
    gap, given = -ratios(trainer, experience), experience.advantages
    known = (mask & ~torch.isnan(experience.rollouts.logp)).sum(-1)  # type: ignore[arg-type]
    far = (gap.sum(-1) / known.clamp(min=1) > 0.1) & (given < 0)
    assert 0 < far.sum() < (given < 0).sum()
    if by_token:  # as a method that weighs tokens leaves them
        given = given[:, None] * torch.linspace(0.5, 1, mask.shape[1])
    shaped = replace(experience, advantages=given)
    batch, metrics = corrected(trainer, shaped, off_policy=0.1)
    out = far[:, None] if by_token else far
    assert torch.equal(batch.advantages, given.masked_fill(out, 0))
    assert metrics["rollout/off_policy_share"] == pytest.approx(float(far.double().mean()))


def test_a_step_learns_with_weights(tmp_path: Path, experience: Experience) -> None:
    """Two updates: the loss has them, the second one by its own prompts."""
    losses = []
    for weight in ("none", "truncate"):
        options = "algorithm.view_mode=none", "worker.actor.mini_batch_size=2"
        given = config(tmp_path / weight, *options)
        rollout = replace(given.worker.rollout, weight=weight)
        learning = Trainer(replace(given, worker=replace(given.worker, rollout=rollout)))
        metrics = learning.learner.update(experience, Views.none(), 1)
        losses.append(metrics["actor/pg_loss"])
    assert losses[0] != losses[1]
