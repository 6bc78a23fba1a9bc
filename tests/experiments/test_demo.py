"""The demo from end to end, with data and steps too few to learn anything."""

import json
from pathlib import Path

import pytest

from experiments.digits.demo import ARMS, Sizes, run_demo

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
            assert set(arm[pool]) == {"L1", "L2", "L3"}
            assert all(entry["n"] == SIZES.test for entry in arm[pool].values())
    assert "roma-grpo" in report["differences"]
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


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds: expected distinct numbers"):
        run_demo(tmp_path, seeds=seeds)
