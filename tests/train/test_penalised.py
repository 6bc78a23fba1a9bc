"""The penalty on every rollout (`algorithm.penalised`), from the rewards to the loss's gradient."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_model
from support.small_run import config
from torch import Tensor

from roma.testing.oracle import view_loss
from roma.train import learner as learner_module
from roma.train.batch import UpdateBatch
from roma.train.collect import Experience
from roma.train.estimate.states import Parameters
from roma.train.estimate.work import Sizes, work
from roma.train.scoring import Scorer
from roma.train.trainer import Trainer
from roma.train.update import PolicyLoss

FAILED = 3  # a rollout without a reward
FORMS: tuple[dict[str, Any], ...] = (
    {"update": "joint", "share_prompt": False},
    {"update": "lean"},
    {"update": "two_pass"},
)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trainer, Experience]]:
    """A run, and what its first step learns from: right and wrong rollouts, one without a reward.

    The first prompt's rollouts are all wrong, with no advantage: the mask would leave them out.
    """
    made = Trainer(config(tmp_path_factory.mktemp("every"), "algorithm.penalised=every"))
    made.step = 1
    experience, metrics = made.collector.collect(made.draw(), 1)
    right = float((experience.rewards["accuracy"] == 1).double().mean())
    assert metrics["reward/accuracy"] == right < 1  # of all rollouts, as ever
    nothing = torch.arange(16) < 4
    rewards = {part: own.masked_fill(nothing, 0) for part, own in experience.rewards.items()}
    rewards["failed"] = (torch.arange(16) == FAILED).float()
    advantages = experience.advantages.masked_fill(nothing, 0)
    experience = replace(experience, rewards=rewards, advantages=advantages)
    assert 0 < experience.correct.sum() < 12
    yield made, experience


def exact(experience: Experience) -> UpdateBatch:
    """The batch of an update in float64, each rollout with a view for the auxiliary loss."""
    views = experience.views.result()
    batch = experience.batch(views, aux_view=torch.arange(16) % 2)
    pixels = batch.prompts.pixel_values.double()
    return replace(
        batch,
        prompts=replace(batch.prompts, pixel_values=pixels),
        view_pixels=[own.double() for own in batch.view_pixels],
        advantages=batch.advantages.double(),
    )


def gradient(policy: torch.nn.Module, loss: Tensor) -> Tensor:
    """By all weights, end to end."""
    weights = [w for w in policy.parameters() if w.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(weights, found, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs])


def test_the_loss_is_the_oracles_with_every_rollout_right(
    every: tuple[Trainer, Experience], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, metric and gradient in each form; a mask that is still on is found."""
    made, experience = every
    policy, options = small_model.policy().double(), made.config.algorithm.roma
    with small_model.exact_norms():
        batch = exact(experience)
        states = torch.stack(Scorer(policy, options)._padded(batch))  # no plan: all on all images
        logits = torch.log_softmax(states @ policy.head_weight.T, -1)
        clean, *views = logits.gather(-1, batch.tokens[None, ..., None].expand(3, -1, -1, 1))[
            ..., 0
        ]
        oracle = view_loss(
            clean,
            torch.stack(views),
            mask=batch.mask,
            advantages=batch.advantages,
            correct=torch.arange(16) != FAILED,
            old_logp=None,
            config=options,
            aux_view=batch.aux_view,
        )
        expected = gradient(policy, oracle.loss)

        def off(form: dict[str, Any]) -> tuple[float, float, float]:
            own, name = exact(experience), "roma_penalty_worst"
            out = PolicyLoss(policy, options, **form)(own, own.totals())
            apart = gradient(policy, out.loss) - expected
            worst = float(out.metrics[name].detach() - oracle.metrics[name].detach())
            loss = float(out.loss.detach() - oracle.loss.detach())
            return abs(loss), abs(worst), float(apart.norm() / expected.norm())

        for form in FORMS:  # 1e-15 was measured
            assert max(off(form)) < 1e-12, form
        monkeypatch.setattr(Experience, "penalised", Experience.correct)
        loss, worst, share = off(FORMS[-1])
        assert min(loss, worst) > 1e-4 and share > 1e-2


def test_views_are_chosen_and_made_by_the_same_rollouts(
    every: tuple[Trainer, Experience], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, experience = every
    given: list[Tensor] = []

    def hardest(_: Tensor, counted: Tensor, k: int) -> list[list[int]]:
        given.append(counted)
        return [[*range(k)]] * len(counted)

    monkeypatch.setattr(learner_module, "hardest", hardest)
    made.learner.choose(experience, experience.views.result())
    probe = made.late_views._probe(experience, 2)
    expected = (torch.arange(16) != FAILED).view(4, 4)
    assert torch.equal(given[0], expected) and torch.equal(probe.counted, expected)


def test_a_step_penalises_and_counts_every_rollout(tmp_path: Path) -> None:
    """What moves λ_inv is the mean over all, and the denominators are one; accuracy is its own."""
    control = ("algorithm.control.target=penalty", "algorithm.control.value=1e-4")
    found = []
    for over in ("all", "correct"):
        options = ("algorithm.penalised=every", f"algorithm.roma.penalty_over={over}", *control)
        made = Trainer(config(tmp_path / over, *options))
        made.step = 1
        seen: list[Tensor] = []
        made.learner.gate.observe = seen.append  # type: ignore[method-assign]
        found.append(made.train_step())
        assert seen[0].isfinite().all()
        worst = float(seen[0].amax(0).mean())
        assert found[-1]["actor/roma_penalty_right"] == pytest.approx(worst, rel=1e-5)
        assert 0 < found[-1]["reward/accuracy"] < 1
    assert found[0]["actor/loss"] == pytest.approx(found[1]["actor/loss"], rel=1e-5)


def test_a_dry_run_counts_every_rollout(tmp_path: Path) -> None:
    parameters, sizes = Parameters.of(config(tmp_path)), Sizes(20, 16, 20, 16, 6)

    def update(right: float, *options: str) -> float:
        return work(config(tmp_path, *options), parameters, sizes, right=right).update

    assert update(0.5, "algorithm.penalised=every") == update(1.0) > update(0.5)
