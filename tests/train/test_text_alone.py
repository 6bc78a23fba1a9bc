"""Questions of text alone beside ones with images, from the file to the step."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_run import config

from roma.train.trainer import Trainer


def rows(folder: Path, *, pictures: int) -> Path:
    """Eight questions, the last ones about two pictures each, the others about none."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        names = [f"{i}{side}.png" for side in "ab"] if i >= 8 - pictures else []
        for name in names:
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / name)
        problem = " ".join([*["<image>"] * len(names), "sum ?"])
        lines.append({"images": names, "problem": problem, "answer": str(i), "id": f"row {i}"})
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("update", ["joint", "lean", "two_pass"])
@pytest.mark.parametrize("pictures", [0, 3])
def test_a_run_with_questions_of_text_alone(update: str, pictures: int, tmp_path: Path) -> None:
    options = (f"data.train_files={rows(tmp_path, pictures=pictures)}", "trainer.val_freq=2")
    trainer = Trainer(config(tmp_path / "run", *options, f"worker.actor.update={update}"))
    trainer.fit()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    for metrics in map(json.loads, lines):
        assert all(value is not None for value in metrics.values())
        assert metrics["actor/grad_norm"] > 0
        assert pictures or metrics["actor/roma_penalty_worst"] == pytest.approx(0, abs=1e-9)
    logged = (tmp_path / "run/views.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in logged].count("row 7") == (pictures > 0)
    assert len(logged) == pictures  # two steps draw each row once


def test_a_row_of_text_differs_from_no_view(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, f"data.train_files={rows(tmp_path, pictures=4)}"))
    trainer.step = 1
    examples = [trainer.data[i] for i in (0, 7, 1, 6)]
    experience, _ = trainer.collector.collect(examples, 1)
    batch = experience.batch(experience.views.result())
    found = trainer.engine.call(trainer.engine.policy_loss.divergence, batch).view(2, 4, 4)
    worst = found.amax(0)  # a view of a level near 0 is the image itself
    assert worst[[0, 2]].abs().max() < 1e-9 and worst[[1, 3]].min() > 1e-4
