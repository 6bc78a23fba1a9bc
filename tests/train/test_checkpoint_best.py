"""A run keeps the checkpoint of its best metric beside the last ones."""

import json
from pathlib import Path

from support.small_run import config

from roma.train.trainer import train


def test_the_best_of_a_run(tmp_path: Path) -> None:
    """Of a metric that falls, which is the learning rate: the first one is the best."""
    options = (
        "trainer.total_steps=4",
        "trainer.save_freq=1",
        "trainer.save_limit=1",
        "trainer.best_metric=actor/lr",
        "algorithm.view_mode=none",
        "worker.actor.schedule=linear",
    )
    train(config(tmp_path, *options))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [line["actor/lr"] for line in lines]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    tracker = json.loads((tmp_path / "checkpoint_tracker.json").read_text())
    assert (tracker["best_global_step"], tracker["best_value"]) == (1, values[0])
    kept = sorted(path.name for path in tmp_path.glob("global_step_*"))
    assert kept == ["global_step_1", "global_step_4"]
