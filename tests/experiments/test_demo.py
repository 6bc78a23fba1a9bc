"""The demo from end to end, with data and steps too few to learn anything."""

import csv
import json
import re
from pathlib import Path

import pytest

from experiments.digits.arms import ARMS
from experiments.digits.demo import LEVELS, Sizes, run_demo
from experiments.runner.jobs import Job
from roma.train.config import dump, load_config
from roma.views import load_levels

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = Sizes(train=64, val=8, test=6, warm_steps=2, steps=2)


@pytest.mark.slow
def test_demo_leaves_what_it_promises_and_runs_again(tmp_path: Path) -> None:
    (tmp_path / "roma-seed9").mkdir()  # of an earlier demo with other seeds: must not be reported
    page = run_demo(tmp_path, seeds=[0], sizes=SIZES)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert page == tmp_path / "report.html" and "<table" in page.read_text(encoding="utf-8")
    assert report["seeds"] == [0] and report["images"] == SIZES.test
    assert set(report["arms"]) == {"base", *ARMS}
    for arm in report["arms"].values():
        assert set(arm["clean"]) == {"mean", "low", "high", "n"}
        for pool in ("seen", "unseen"):
            assert set(arm[pool]) == {"L1", "L2", "L3", "L4"}
            assert all(entry["n"] == SIZES.test for entry in arm[pool].values())
    assert {"roma-grpo", "roma-naive_mild"} <= set(report["differences"])
    demo = load_config(CONFIGS / "demo.yaml").algorithm.views.max_level
    assert report["trained_to"] == demo
    assert report["config"]["arms"]["naive"]["algorithm"]["views"]["max_level"] == demo
    assert report["config"]["arms"]["naive_mild"]["algorithm"]["views"]["max_level"] == 2
    assert {"data", "warm_start", "train_and_evaluate", "runs"} <= set(report["timings"])
    assert not (tmp_path / "roma-seed9").exists()
    for arm in ARMS:
        lines = (tmp_path / f"{arm}-seed0" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == report["timings"]["runs"][f"{arm}-seed0"]["steps"] >= SIZES.steps
        logged = json.loads(lines[-1])
        assert {"rollout/distinct_share", "response_length/mean"} <= logged.keys()
        # Per corruption only where an answer was right, which two steps do not promise.
        assert ("actor/roma_penalty_worst" in logged) == (arm == "roma")
    assert len(list(tmp_path.glob("*.png"))) >= 3
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        costs = [row for row in csv.DictReader(file) if row["kind"] == "cost"]
    assert {row["arm"] for row in costs} == set(ARMS)

    # A method beside them: what is finished with the same settings is not run again.
    own = {arm: (tmp_path / f"{arm}-seed0" / "answers.json").stat().st_mtime_ns for arm in ARMS}
    run_demo(tmp_path, seeds=[0], sizes=SIZES, methods=["vgpo"])
    more = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(more["arms"]) == [*report["arms"], "vgpo"]
    assert {a: tree for a, tree in more["arms"].items() if a != "vgpo"} == report["arms"]
    again = {arm: (tmp_path / f"{arm}-seed0" / "answers.json").stat().st_mtime_ns for arm in ARMS}
    assert again == own
    assert more["costs"]["grpo"] == report["costs"]["grpo"]
    assert "vgpo-grpo" in more["differences"]


def test_the_hardest_level_lies_beyond_training_and_the_one_before_it_inside() -> None:
    table = load_levels(CONFIGS / "demo_levels.yaml")
    assert all(max(LEVELS) <= len(corruption.levels) for corruption in table.values())
    for path in CONFIGS.glob("demo*.yaml"):
        if "levels" not in path.stem:
            assert LEVELS[-2] <= load_config(path).algorithm.views.max_level < LEVELS[-1], path


def test_a_job_with_other_settings_is_not_finished(tmp_path: Path) -> None:
    def job(*overrides: str) -> Job:
        needed = ["data.train_files=a", "worker.actor.model_path=b", *overrides]
        config = load_config(None, needed)
        return Job(arm="x", seed=0, folder=tmp_path, images=tmp_path, config=config)

    assert job().took() is None
    for name in ("took.json", "answers.json"):
        (tmp_path / name).write_text('{"steps": 2}')
    assert job().took() is None  # no config.yaml
    config = job().config
    assert config is not None
    text = dump(config)
    (tmp_path / "config.yaml").write_text(text)
    assert job().took() == {"steps": 2}
    assert job("worker.actor.lr=1e-5").took() is None
    without = re.sub(r"  reweight: none\n", "", text)  # as a version before it had written
    assert without != text
    (tmp_path / "config.yaml").write_text(without)
    assert job().took() == {"steps": 2} and job("algorithm.reweight=vgpo").took() is None
    (tmp_path / "config.yaml").write_text(text + "unknown: 1\n")
    assert job().took() is None


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds: expected distinct numbers"):
        run_demo(tmp_path, seeds=seeds)
