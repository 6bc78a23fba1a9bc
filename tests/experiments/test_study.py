"""The studies: every arm is a configuration that the trainer takes; slips are said at once."""

from pathlib import Path

import pytest

from experiments.digits.study import STUDIES, _Run, run_study
from experiments.report.control import moving
from experiments.report.markdown import tables
from roma.train.config import to_dict
from roma.train.config.schema import leaves

ARMS = [(name, arm) for name, study in STUDIES.items() for arm in study.arms]
DEMOS = {"grpo", "roma"}


def a_run(name: str, out: Path) -> _Run:
    """A study in a folder that a demo might have made."""
    (out / "study").mkdir()
    for made in ("made.json", "study/val_images.pickle", "study/test_images.pickle"):
        (out / made).touch()
    return _Run(name, out, [0], [])


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_changes_its_option_alone(name: str, arm: str, tmp_path: Path) -> None:
    run = a_run(name, tmp_path)
    own, roma = (dict(leaves(to_dict(run.config(a, 0)))) for a in (arm, "roma"))
    changed = {key for key, value in own.items() if value != roma[key]} - {"trainer.out"}
    asked = {x.partition("=")[0] for x in STUDIES[name].arms[arm].overrides}
    assert changed == asked - ({"algorithm.view_mode"} if arm != "grpo" else set())
    # The demo's own arms are those that it has trained.
    place = tmp_path if arm in DEMOS else tmp_path / "study"
    assert own["trainer.out"] == f"{place}/{arm}-seed0"
    trained = run._measured(arm, 0, "val")
    assert (trained.config is None) == (arm in DEMOS)
    tested = run._measured(arm, 0, "test")
    assert tested.config is None and tested.model == place / f"{arm}-seed0/global_step_220/actor"


def test_slips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study: expected one of attack, gate, control, got 'x'"):
        run_study("x", tmp_path)
    with pytest.raises(ValueError, match=r"arms: expected some of grpo, roma, .* got 'y'"):
        run_study("gate", tmp_path, arms=["y"])
    with pytest.raises(ValueError, match=r"out: expected the folder of a demo, .* run make demo"):
        run_study("gate", tmp_path)


def test_tables_in_markdown() -> None:
    entry = {"mean": 61.24, "low": 60.0, "high": 63.0, "n": 5}
    gap = {"mean": -1.25, "low": -2.5, "high": 0.04, "n": 5}
    report = {
        "arms": {"grpo": {"clean": entry, "seen": {"L1": entry, "L3": entry}}},
        "costs": {"grpo": {"steps": [220, 220], "cpu_s": [30.2, 31.0]}},
        "differences": {"roma-grpo": {"mean": {"clean": gap, "seen": {"L1": gap, "L3": gap}}}},
    }
    assert tables(report).splitlines() == [
        "| arm | steps | CPU s a run | clean | seen L1 | seen L3 |",
        "|---|---|---|---|---|---|",
        "| GRPO | 220 | 31 | 61.2 | 61.2 | 61.2 |",
        "",
        "| difference, points | clean | seen L3 |",
        "|---|---|---|",
        "| ROMA − GRPO | −1.2 [−2.5, +0.0] | −1.2 [−2.5, +0.0] |",
    ]


def test_the_figure_of_a_moving_lambda() -> None:
    rows = [
        {"step": s, "actor/lambda_inv": 2.0 / s, "actor/roma_penalty_right": 0.1 / s}
        for s in range(1, 30)
    ]
    rows.append({"step": 30, "actor/lambda_inv": 0.07})  # a step without a right rollout
    above, below = moving([("penalty", 0.02, rows)]).axes
    assert len(above.lines[0].get_xdata()) == 30 and len(below.lines[0].get_xdata()) == 29
    assert set(below.lines[-1].get_ydata()) == {0.02}
