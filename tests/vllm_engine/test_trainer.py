"""The trainer with vLLM's rollouts: what it samples with is what it has just learnt."""

import pytest
from support.small_run import config
from vllm_engine.model import folder

from roma.train.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["worker.actor.lora.rank=4"]], ids=["whole", "adapters"])
def test_a_run(tmp_path, more):
    """Adapters reach vLLM merged. Weights one step old would differ by far more than 1e-5 nats."""
    rows = []
    given = [
        f"worker.actor.model_path={folder()}",
        "worker.actor.lr=1e-2",
        "worker.rollout.name=vllm",
        "worker.rollout.weight=truncate",
        "trainer.total_steps=3",
        "trainer.val_freq=3",
    ]
    Trainer(config(tmp_path, *given, *more)).fit(lambda _, metrics: rows.append(dict(metrics)))
    assert len(rows) == 3 and "val/accuracy" in rows[-1]
    assert all(row["rollout/mismatch_p99"] < 1e-5 for row in rows)
    assert all(row["rollout/weight_clipped_share"] == 0 for row in rows)


@pytest.mark.slow
def test_old_weights_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("roma.rollout.vllm.VllmSampler._load", lambda self: None)
    rows = []
    given = [
        f"worker.actor.model_path={folder()}",
        "worker.actor.lr=1e-2",
        "worker.rollout.name=vllm",
        "trainer.total_steps=2",
    ]
    Trainer(config(tmp_path, *given)).fit(lambda _, metrics: rows.append(dict(metrics)))
    assert rows[0]["rollout/mismatch_p99"] < 1e-5 < 1e-3 < rows[1]["rollout/mismatch_p99"]
