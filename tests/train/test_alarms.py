"""Alarms: each on a planted series, once until it clears; none on a run that went well."""

import csv
import math
from pathlib import Path

import pytest

from roma.train.alarms import SETTLED, Alarms
from roma.train.config import load_config

HEALTHY = Path(__file__).with_name("healthy_series.csv")
"""The demo's ROMA run of seed 0, the one of its twelve runs with the largest jumps."""
NORMAL = {
    "actor/loss": 0.01,
    "actor/grad_norm": 0.5,
    "actor/roma_penalty_worst": 0.004,
    "reward/accuracy": 0.5,
    "reward/format": 0.9,
    "reward/failed": 0.0,
    "advantage/nonzero_share": 0.5,
    "response_length/clip_ratio": 0.01,
    "rollout/distinct_share": 0.9,
    "rollout/mismatch_mean": 0.001,
}


def alarms(*overrides: str) -> Alarms:
    """Of a run of 64 prompts × 8 rollouts."""
    needed = ["data.train_files=d", "worker.actor.model_path=m"]
    sizes = ["data.rollout_batch_size=64", "worker.rollout.n=8"]
    return Alarms(load_config(None, [*needed, *sizes, *overrides]))


def said(found: Alarms, name: str, values: list[float], first: int = 1) -> list[int]:
    """The steps at which a metric gives a line, the others being normal."""
    steps = []
    for step, value in enumerate(values, start=first):
        lines = found.check(step, {**NORMAL, name: value})
        assert len(lines) <= 1
        assert all(name in line and line.startswith(f"step {step}: ") for line in lines)
        assert all("\n" not in line for line in lines)
        steps += [step] * len(lines)
    return steps


@pytest.mark.parametrize("mode", ["roma", "none"])
def test_a_healthy_run_gives_none(mode: str) -> None:
    with HEALTHY.open() as file:
        rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
    found = alarms("data.rollout_batch_size=32", f"algorithm.view_mode={mode}")
    assert len(rows) == 220
    assert [line for row in rows for line in found.check(int(row.pop("step")), row)] == []


@pytest.mark.parametrize(
    ("name", "bad", "between", "patience"),
    [
        # distinct · 8 - 1: 0.04, 0.08, and back to 6.2
        ("rollout/distinct_share", 0.13, 0.135, 3),
        ("response_length/clip_ratio", 0.26, 0.2, 3),
        ("advantage/nonzero_share", 0.0, 0.0, 3),
        ("reward/failed", 0.11, 0.07, 1),
        ("reward/format", 0.0, 0.0, 5),
        ("rollout/mismatch_mean", 0.11, 0.07, 2),
        ("actor/grad_norm", 5.1, 2.6, 2),
        ("actor/grad_norm", 51.0, 2.6, 1),
        ("actor/grad_norm", math.nan, math.inf, 1),
        ("actor/loss", math.nan, math.inf, 1),
        ("actor/roma_penalty_worst", 0.041, 0.021, 2),
        ("actor/roma_penalty_worst", 0.41, 0.021, 1),
        ("actor/roma_penalty_worst", 3.9e-5, 3.9e-4, 3),
        ("actor/roma_penalty_worst", 0.0, 3.9e-4, 3),
    ],
)
def test_each_goes_off_once_and_again_after_it_has_cleared(
    name: str, bad: float, between: float, patience: int
) -> None:
    found, normal = alarms(), NORMAL[name]
    assert said(found, name, [normal] * SETTLED) == []
    if patience > 1:  # one step less, and a normal one, starts the count anew
        assert said(found, name, [bad] * (patience - 1) + [normal]) == []
    assert said(found, name, [bad] * (patience + 30)) == [patience]
    # The milder bound: not over yet, so nothing new.
    assert said(found, name, [between, *[bad] * patience]) == []
    assert said(found, name, [normal] + [bad] * patience) == [patience + 1]


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("rollout/distinct_share", 0.132),
        ("response_length/clip_ratio", 0.25),
        ("advantage/nonzero_share", 0.002),
        ("reward/failed", 0.1),
        ("reward/format", 0.002),
        ("rollout/mismatch_mean", 0.1),
        ("actor/grad_norm", 4.9),
        ("actor/roma_penalty_worst", 0.039),
        ("actor/roma_penalty_worst", 4.1e-5),
    ],
)
def test_the_near_side_of_each_bound(name: str, fine: float) -> None:
    found = alarms()
    assert said(found, name, [NORMAL[name]] * SETTLED + [fine] * 8) == []


def test_a_jump_needs_a_usual_value() -> None:
    assert said(alarms(), "actor/grad_norm", [0.5] * (SETTLED - 2) + [500.0, 500.0]) == []
    # What was called unusual does not become usual: it goes off for as long as it lasts.
    series = [0.5] * SETTLED + [500.0] * 60 + [0.5] + [500.0]
    assert said(alarms(), "actor/grad_norm", series) == [SETTLED + 1, SETTLED + 62]


def test_gradients_after_none_are_no_jump() -> None:
    assert said(alarms(), "actor/grad_norm", [0.0] * 20 + [0.5] * 3) == []


def test_a_rise_that_takes_its_time_is_none() -> None:
    assert said(alarms(), "actor/grad_norm", [0.5 * 1.1**step for step in range(100)]) == []


def test_few_rollouts_take_more_steps_to_call_a_format_missing() -> None:
    found = alarms("data.rollout_batch_size=4", "worker.rollout.n=4")  # 460 / 16
    assert said(found, "reward/format", [0.0] * 40) == [29]


def test_one_rollout_a_question_is_not_told_to_have_more() -> None:
    """mssr refuses a worker.rollout.n above 1: its rollouts are compared over the step."""
    for options, wanted in (
        ((), "worker.rollout.n"),
        (("algorithm.adv_estimator=mssr", "worker.rollout.n=1"), "data.rollout_batch_size"),
    ):
        found = alarms(*options)
        lines = [found.check(step, {"advantage/nonzero_share": 0.0}) for step in range(3)][-1]
        assert f"a higher {wanted} or temperature" in lines[0]


def test_no_right_answer_is_no_missing_penalty() -> None:
    found = alarms()
    values = {**NORMAL, "reward/accuracy": 0.0, "actor/roma_penalty_worst": 0.0}
    assert [line for step in range(20) for line in found.check(step, values)] == []


@pytest.mark.parametrize("gate", ["views.gate_quantile=0.9", "roma.gate_bound=1"])
def test_a_penalty_that_a_gate_leaves_out_is_not_missing(gate: str) -> None:
    found = alarms(f"algorithm.{gate}")
    assert said(found, "actor/roma_penalty_worst", [0.0] * 20) == []
    assert said(found, "actor/roma_penalty_mean", [0.0] * 20) == [3]


@pytest.mark.parametrize("override", ["algorithm.view_mode=none", "algorithm.roma.lambda_inv=0"])
def test_a_run_without_a_penalty_has_no_alarm_for_it(override: str) -> None:
    assert said(alarms(override), "actor/roma_penalty_worst", [0.0] * 20) == []


@pytest.mark.parametrize("mode", ["papo", "dvrp"])
def test_a_masked_term_that_runs_away(mode: str) -> None:
    series = [0.02] * SETTLED + [0.21] * 3
    name = "actor/contrast_masked"
    assert said(alarms(f"algorithm.view_mode={mode}"), name, series) == [SETTLED + 2]
    assert said(alarms(), name, series) == []


def test_a_lambda_that_stays_at_its_bound() -> None:
    options = ("algorithm.control.target=penalty", "algorithm.control.value=0.01")
    for bound in (1e-3, 100.0):
        series = [bound] * 19 + [1.0] + [bound] * 40 + [1.0] + [bound] * 20
        assert said(alarms(*options), "actor/lambda_inv", series) == [40, 81]
    assert said(alarms(), "actor/lambda_inv", [100.0] * 60) == []


def test_one_rollout_a_prompt_cannot_collapse() -> None:
    found = alarms("worker.rollout.n=1", "algorithm.adv_estimator=mssr")
    assert said(found, "rollout/distinct_share", [1.0] * 20) == []


def test_metrics_that_a_step_lacks_are_passed_over() -> None:
    found = alarms()
    assert [line for step in range(20) for line in found.check(step, {})] == []


def test_several_at_once_are_several_lines() -> None:
    lines = alarms().check(3, {**NORMAL, "actor/loss": math.nan, "reward/failed": 1.0})
    assert [line.split(" is ")[0] for line in lines] == [
        "step 3: actor/loss",
        "step 3: reward/failed",
    ]


def test_a_penalty_counts_by_right_answers() -> None:
    """It is a sum over them: more right ones are no jump."""
    found = alarms()
    for step in range(1, 41):
        right = 0.05 if step <= 25 else 0.9
        values = {"actor/roma_penalty_worst": 0.02 * right, "reward/accuracy": right}
        assert not [line for line in found.check(step, values) if "penalty" in line]


def test_a_penalty_on_every_rollout_does_not_count_by_right_answers() -> None:
    """More right ones are no fall; without a right one it is missing all the same."""
    found, name = alarms("algorithm.penalised=every"), "actor/roma_penalty_worst"
    for step in range(1, 41):
        values = {name: 0.02, "reward/accuracy": 1e-3 if step <= 25 else 0.9}
        assert not [line for line in found.check(step, values) if "penalty" in line]
    gone = [found.check(step, {name: 0.0, "reward/accuracy": 0.0}) for step in range(41, 44)]
    assert [len(lines) for lines in gone] == [0, 0, 1]
    assert f"{name} / (1 - reward/failed) is 0" in gone[2][0]
    assert "no longer change answers" in gone[2][0]
    failed = {name: 0.0, "reward/failed": 1.0}  # there is nothing to penalise
    found = alarms("algorithm.penalised=every")
    lines = [line for step in range(20) for line in found.check(step, failed)]
    assert not [line for line in lines if "penalty" in line]
