"""The studies: every arm is a configuration that the trainer takes; slips are said at once."""

from pathlib import Path

import pytest

from experiments.digits.study import STUDIES, _Run, run_study
from experiments.report.control import moving
from experiments.report.markdown import tables
from roma.train.config import to_dict
from roma.train.config.schema import leaves

ARMS = [(name, arm) for name, study in STUDIES.items() for arm in study.arms]
DEMOS = {"grpo"}
"""Arms that a study takes from the demo as they are: without views, so that no severity differs."""


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
    usual = (
        {"algorithm.views.max_level"} if arm in DEMOS else set(STUDIES[name].arms["roma"].overrides)
    )
    asked = set(STUDIES[name].arms[arm].overrides) - usual
    assert changed == {x.partition("=")[0] for x in asked} | (usual if arm in DEMOS else set())
    # The published figures were made with views up to level 2, the attacks alone up to 3.
    if own["algorithm.view_mode"] != "none":
        assert own["algorithm.views.max_level"] == (3 if arm == "pgd" else 2)
    # The demo's own arms are those that it has trained.
    place = tmp_path if arm in DEMOS else tmp_path / "study"
    assert own["trainer.out"] == f"{place}/{arm}-seed0"
    attacked = bool(STUDIES[name].attacks)
    for split in ("val", "test"):
        job, model = run._measured(arm, 0, split), place / f"{arm}-seed0/global_step_220/actor"
        if split == "val" and not attacked and arm not in DEMOS:
            assert job == run._trained(arm, 0) and job.config is not None
        else:
            assert job.config is None and job.model == model
            assert job.folder.parent.name == split + "-attacked" * attacked


def test_studies_share_the_runs_of_an_arm_that_they_share(tmp_path: Path) -> None:
    """One study measures it under attack, the other does not: the run itself is the same job."""
    (tmp_path / "a").mkdir()
    attack = a_run("attack", tmp_path / "a")
    gate = _Run("gate", tmp_path / "a", [0], [])
    assert attack._trained("roma", 0) == gate._trained("roma", 0)
    assert not attack._trained("roma", 0).attacks
    assert attack._measured("roma", 0, "val").attacks == (2, 3, 4)
    assert attack._measured("roma", 0, "val").folder != gate._measured("roma", 0, "val").folder


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


def test_tables_in_markdown_stand_inside_training_and_beyond_it() -> None:
    entry = {"mean": 50.0, "low": 49.0, "high": 51.0, "n": 5}
    levels = {f"L{level}": entry for level in (1, 2, 3, 4)}
    tree = {"clean": entry, "seen": levels, "unseen": levels, "adversarial": levels}
    report = {
        "trained_to": 3.5,
        "arms": {"roma": tree},
        "costs": {},
        "differences": {"roma-grpo": {"mean": tree}},
    }
    heading = tables(report).split("\n\n")[1].splitlines()[0]
    assert heading == (
        "| difference, points | clean | seen L3 | unseen L3 | adversarial L1 | adversarial L2 |"
        " adversarial L3 | adversarial L4 | seen L4 | unseen L4 |"
    )


def test_the_figure_of_a_moving_lambda() -> None:
    rows = [
        {"step": s, "actor/lambda_inv": 2.0 / s, "actor/roma_penalty_right": 0.1 / s}
        for s in range(1, 30)
    ]
    rows.append({"step": 30, "actor/lambda_inv": 0.07})  # a step without a right rollout
    above, below = moving([("penalty", 0.02, rows)]).axes
    assert len(above.lines[0].get_xdata()) == 30 and len(below.lines[0].get_xdata()) == 29
    assert set(below.lines[-1].get_ydata()) == {0.02}
