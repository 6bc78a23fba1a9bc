"""Rewards that raise, hang, die or return nonsense: the run ends in time, with the counts right."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_run import config
from torch import Tensor

from roma.advantages import ESTIMATORS, AdvantageInputs, Estimator, rloo
from roma.rewards import Failed, RewardError
from roma.train.collect import Experience
from roma.train.refine import advantages_of
from roma.train.trainer import Trainer

TIMEOUT = {"hang": 0.4}  # seconds; another way to fail waits for none
OWN = """
import os, time

def compute_score(rows):
    \"\"\"Fails as told for the first row of the second prompt's four, and all of the third's.\"\"\"
    scores = []
    for row in rows:
        place = PLACES.index(row["id"]) if row["id"] in PLACES else 0
        if place == 2 or (place == 1 and not os.path.exists(ONCE)):
            open(ONCE, "a").close()
            FAIL
        right = float(len(row["response"]) % 2 == 0)
        scores.append({"overall": right, "format": 1.0, "accuracy": right})
    return scores
"""
WAYS = {
    "raise": "raise KeyError('x')",
    "hang": "time.sleep(3600)",
    "die": "os._exit(3)",
    "nan": "scores.append({'overall': float('nan'), 'format': 1, 'accuracy': 1}); continue",
}


def watched(trainer: Trainer) -> list[Experience]:
    """Keeps what a trainer's steps learn from."""
    collect, seen = trainer.collector.collect, []

    def kept(examples: Any, step: int) -> Any:
        found = collect(examples, step)
        seen.append(found[0])
        return found

    trainer.collector.collect = kept  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    "way", ["raise", "die", "nan", pytest.param("hang", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_without_them(
    way: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own, out, once = tmp_path / "own.py", tmp_path / "run", tmp_path / "once"
    timeout = TIMEOUT.get(way, 1.0)
    options = (f"worker.reward.function={own}:compute_score", f"worker.reward.timeout_s={timeout}")
    own.write_text("def compute_score(rows): pass")
    first = Trainer(config(out, *options))
    first.step = 1
    places = [example.id for example in first.draw()]
    text = OWN.replace("PLACES", repr(places)).replace("ONCE", repr(str(once)))
    own.write_text(text.replace("FAIL", WAYS[way]))
    trainer = Trainer(config(out, *options, "trainer.total_steps=1"))
    seen = watched(trainer)
    capfd.readouterr()
    begin = time.monotonic()
    trainer.fit()
    # Ten time-outs for the batch and one for each row of a prompt, the step, and starting anew.
    assert time.monotonic() - begin < 14 * timeout + 40
    (experience,) = seen
    failed = experience.failed.view(4, 4)
    assert failed[0].sum() == failed[3].sum() == 0 and failed[2].all()
    count = int(failed.sum())
    # In a batch that is called again row by row, the second prompt has failed once before.
    assert count == (5 if way == "nan" else 4)
    assert not experience.correct[experience.failed].any()
    assert not experience.advantages[experience.failed].any()
    (metrics,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert metrics["reward/failed"] == count / 16
    good = experience.rewards["overall"][~experience.failed]
    assert metrics["reward/overall"] == pytest.approx(float(good.mean()))
    assert metrics["reward/format"] == 1
    assert all(value is not None for value in metrics.values())  # NaN would be null
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "no reward" in line]
    row = places[1] if way == "nan" else places[2]
    assert line.startswith(
        f"step 1: no reward for {count} of 16 rollouts; the first, of row {row}: "
    )
    logged = [json.loads(x) for x in (out / "reward_failures.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [1] * count
    assert {entry["id"] for entry in logged} == {places[2], row}
    assert all(entry["reason"] for entry in logged)


def test_every_rollout_failing_moves_nothing_by_the_reward(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path))
    trainer.step = 1
    trainer.collector.score = lambda rows: [Failed("none today")] * len(rows)
    seen = watched(trainer)
    metrics = trainer.train_step()
    assert metrics["reward/failed"] == 1 and "reward/overall" not in metrics
    assert metrics["advantage/nonzero_share"] == 0 and not seen[0].correct.any()
    assert metrics["actor/grad_norm"] == 0


def test_a_validation_answer_without_a_reward_is_wrong(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "trainer.val_freq=1"))
    right = {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
    trainer.collector.score = lambda rows: [
        right if i % 4 else Failed("x") for i in range(len(rows))
    ]
    metrics = trainer.validate()
    assert metrics["val/failed"] == 0.25 and metrics["val/accuracy"] == 0.75


def test_stop_ends_the_run(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def f(rows): raise KeyError('x')")
    run = config(tmp_path, f"worker.reward.function={own}:f", "worker.reward.on_error=stop")
    trainer = Trainer(run)
    trainer.step = 1
    with pytest.raises(RewardError, match="KeyError"):
        trainer.train_step()


# ---- advantages


def inputs(rewards: Tensor, group: Tensor, **others: Tensor) -> AdvantageInputs:
    return AdvantageInputs(rewards, group, torch.ones(len(group), 3, dtype=torch.bool), **others)


REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.25, 0.0, 1.0, 0.0])
GROUP = torch.tensor([3, 3, 3, 3, 7, 7, 7, 9, 9])


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("value", [0.0, -1e30, float("nan")])
def test_a_failed_rollout_enters_no_statistic(name: str, value: float) -> None:
    """Whatever stands in its place: the others' advantages are those without it."""
    failed = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    found = advantages_of(
        ESTIMATORS[name], inputs(REWARDS.masked_fill(failed, value), GROUP), failed
    )
    taken = torch.tensor([0, 2, 3, 4, 5, 6])  # of group 9 one is left, alone
    alone = ESTIMATORS[name](inputs(REWARDS[taken], GROUP[taken]))
    assert torch.equal(found[taken], alone) and found[taken].count_nonzero() == 6
    assert not found[[1, 7, 8]].any()


def test_the_share_of_a_rollout_that_sets_the_mean_shows() -> None:
    """The group's mean in its place, as others do it, would change GRPO's deviation."""
    failed = torch.tensor([False, False, False, True])
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0])
    group = torch.zeros(4, dtype=torch.int64)
    right = advantages_of(ESTIMATORS["grpo"], inputs(rewards, group), failed)
    filled = ESTIMATORS["grpo"](inputs(torch.tensor([1.0, 0.0, 0.5, 0.5]), group))
    assert right[0] == pytest.approx(1.0, abs=1e-5) and filled[0] > 1.2


def test_estimators_of_tokens_and_with_needs_get_the_others_alone() -> None:
    seen: list[AdvantageInputs] = []

    def by_entropy(given: AdvantageInputs) -> Tensor:
        seen.append(given)
        assert given.entropy is not None
        return given.entropy * rloo(given.rewards, given.group)[:, None]

    failed = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    entropy = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) + 1
    given = inputs(REWARDS, GROUP, entropy=entropy)
    found = advantages_of(Estimator(by_entropy, frozenset({"entropy"})), given, failed)
    assert found.shape == (9, 3) and not found[0].any() and found[1].all()
    assert torch.equal(seen[0].entropy, entropy[1:]) and len(seen[0].mask) == 8  # type: ignore[arg-type]


def test_without_failures_the_estimator_gets_its_inputs_as_they_are() -> None:
    given = inputs(REWARDS, GROUP)
    none, seen = torch.zeros(9, dtype=torch.bool), []
    estimator = Estimator(lambda x: seen.append(x) or x.rewards)  # type: ignore[func-returns-value]
    assert advantages_of(estimator, given, none) is REWARDS and seen[0] is given


def test_a_single_rollout_is_a_group_of_its_own() -> None:
    """n = 1: an estimator that keeps a baseline per prompt gets every rollout that has a reward."""
    failed = torch.tensor([False, True, False])
    group = torch.arange(3)
    estimator = Estimator(lambda given: given.rewards - 0.5)
    found = advantages_of(estimator, inputs(torch.tensor([1.0, 1.0, 0.0]), group), failed)
    assert found.tolist() == [0.5, 0.0, -0.5]
