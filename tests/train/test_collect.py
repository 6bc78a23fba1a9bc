"""From questions to experience: which engine samples, what an estimator gets and may return."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_run import config
from torch import Tensor

from roma.advantages import AdvantageInputs, Estimator, grpo
from roma.models.prompts import PromptBatch
from roma.rollout.base import Rollouts
from roma.train.trainer import Trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    """A run before its first step."""
    made = Trainer(config(tmp_path))
    made.step = 1
    yield made


def test_an_estimator_gets_what_it_asks_for(trainer: Trainer) -> None:
    """Of all rollouts at once, as the policy on the images that were sampled on scores them."""
    seen: list[AdvantageInputs] = []

    def by_entropy(given: AdvantageInputs) -> Tensor:
        seen.append(given)
        assert given.entropy is not None
        return grpo(given.rewards, given.group)[:, None] * given.entropy

    needs = frozenset({"logp", "entropy", "hidden"})
    trainer.collector.estimator = Estimator(by_entropy, needs)
    experience, metrics = trainer.collector.collect(trainer.draw(), 1)
    (given,) = seen
    whole = trainer.engine.policy_loss.score(
        experience.batch(experience.views.result()), hidden=True, entropy=True
    )
    close = {"rtol": 0, "atol": 5e-6}
    torch.testing.assert_close(given.logp, whole.logp, **close)
    torch.testing.assert_close(given.entropy, whole.entropy, **close)
    mask = experience.rollouts.mask
    torch.testing.assert_close(given.hidden[mask], whole.hidden[mask], rtol=0, atol=5e-5)
    assert torch.equal(given.mask, mask) and torch.equal(given.group, experience.group)
    assert torch.equal(given.rewards, experience.rewards["overall"])
    assert experience.advantages.shape == mask.shape
    taught = (experience.advantages != 0).any(1).float().mean()
    assert metrics["advantage/nonzero_share"] == float(taught) > 0


def test_advantages_of_tokens_are_learnt_from(trainer: Trainer) -> None:
    """The same advantage at every token is the advantage of the sequence."""
    steps = []
    for per_token in (False, True):

        def advantages(given: AdvantageInputs, per_token: bool = per_token) -> Tensor:
            found = grpo(given.rewards, given.group)
            return found[:, None].expand(given.mask.shape) if per_token else found

        fresh = Trainer(trainer.config)
        fresh.step = 1
        fresh.collector.estimator = Estimator(advantages)
        metrics = fresh.train_step()
        steps.append({name: v for name, v in metrics.items() if name.startswith("actor/")})
    assert steps[0] == pytest.approx(steps[1], abs=1e-6)


def test_without_needs_nothing_is_scored(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: Any, **__: Any) -> None:
        pytest.fail("rollouts were scored")

    monkeypatch.setattr(type(trainer.engine.policy_loss), "score", score)
    trainer.collector.collect(trainer.draw(), 1)


class Parrot:
    """Another engine: it repeats one answer, and reports a log-prob of its own."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sample(self, prompts: PromptBatch, **options: Any) -> Rollouts:
        self.calls.append(options)
        shape = (len(prompts.images) * options["group_size"], 3)
        mask = torch.ones(shape, dtype=torch.bool)
        return Rollouts(torch.full(shape, 9), mask, mask[:, 0], torch.full(shape, -1.0))


def test_another_engine_can_sample(trainer: Trainer) -> None:
    trainer.collector.sampler = Parrot()
    metrics = trainer.train_step()
    assert metrics["response_length/mean"] == 3 and metrics["response_length/clip_ratio"] == 0
    assert metrics["rollout/distinct_share"] == 4 / 16
    trainer.validate()
    training, *validation = trainer.collector.sampler.calls
    assert training.keys() == {"group_size", "max_new_tokens", "temperature", "seed"}
    assert (training["group_size"], training["temperature"]) == (4, 1.0)
    assert (
        validation == [{"group_size": 1, "max_new_tokens": 6, "temperature": None, "seed": 0}] * 2
    )


def test_rollouts_on_views_see_them_in_both_forms(tmp_path: Path) -> None:
    """An engine may read the patches or the images: both are the degraded ones."""
    trainer = Trainer(config(tmp_path, "algorithm.view_mode=rollout"))
    examples = trainer.draw()
    experience, _ = trainer.collector.collect(examples, 1)
    prompts, clean = experience.prompts, trainer.collector.encode(examples)
    again = trainer.policy.view_pixels(clean, prompts.images)
    assert torch.equal(again, prompts.pixel_values)
    assert not torch.equal(clean.pixel_values, prompts.pixel_values)
