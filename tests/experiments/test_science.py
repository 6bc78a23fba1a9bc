"""The science: every arm changes what it says alone; chains are read right; pages hold the CSV."""

import csv
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console

from experiments.report.rows import FIELDS
from experiments.runner.jobs import Job
from experiments.science import pages, perception, results
from experiments.science import study as study_module
from experiments.science.perception import follows, named_digits, readings
from experiments.science.plan import ABLATIONS, CHOSEN, SEEDS, SEVERITIES, STUDIES, at
from experiments.science.results import Table, over_seeds, write
from experiments.science.stages import STAGES, run_stages
from experiments.science.study import StudyRun
from experiments.science.task import Place
from roma.data import Example
from roma.evaluate.conditions import Cell
from roma.evaluate.result import CellResult, EvalResult
from roma.train.config import to_dict
from roma.train.config.schema import leaves

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths of runs are relative


def settings(study: str, arm: str, out: Path) -> dict[str, object]:
    """An arm's configuration, flat, without the folder of its run."""
    own = STUDIES[study]
    config = Place(own.task, out, Console()).config(arm, own.arms[arm], 0)
    found = dict(leaves(to_dict(config)))
    found.pop("trainer.out")
    return found


@pytest.mark.parametrize("severity", SEVERITIES)
def test_methods_of_one_severity_differ_in_themselves_alone(
    severity: float, tmp_path: Path
) -> None:
    roma = settings("severity", at("roma", severity), tmp_path)
    assert roma["algorithm.views.max_level"] == severity
    for method in ("naive", "noisyrollout", "dvrp"):
        own = settings("severity", at(method, severity), tmp_path)
        assert {key for key in roma if own[key] != roma[key]} == {"algorithm.view_mode"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing(name: str, tmp_path: Path) -> None:
    roma, own = (
        settings("ablations", arm, tmp_path) for arm in (at("roma", CHOSEN), f"roma_{name}")
    )
    (change,) = ABLATIONS[name]
    assert {key for key in roma if own[key] != roma[key]} == {f"algorithm.{change.split('=')[0]}"}


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_compared_is_there(name: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    assert {arm for pair in study.pairs for arm in pair} <= set(study.arms)
    for arm, (kind, other) in study.as_long_as.items():
        assert study.arms[arm] == study.arms[kind] and other in study.arms
    assert len(study.seeds) >= 3
    (steps,) = {settings(name, arm, tmp_path)["trainer.total_steps"] for arm in study.arms}
    assert steps


def example(problem: str, left: int, right: int) -> Example:
    solution = f"<think> left {left} right {right} so 0 </think> \\boxed{{ 0 }}"
    return Example("id", (), f"<image> {problem} ?", "0", solution)


def said(left: int, right: int, answer: int) -> str:
    return f"<think> left {left} right {right} so {answer} </think> \\boxed{{ {answer} }}"


def test_readings_by_hand() -> None:
    asked = [
        example("sum", 3, 4),
        example("sum", 3, 4),
        example("larger", 9, 1),
        example("sum", 2, 2),
    ]
    texts = [said(3, 4, 7), said(4, 3, 7), said(9, 1, 8), "left 2 right 2 so 4"]
    found = readings(CellResult(np.zeros(4, dtype=np.uint8), texts), asked)
    assert found.misread.tolist() == [0, 1, 0, 1]  # the last names nothing that can be read
    assert found.unfaithful.tolist() == [0, 0, 1, 1]
    assert found.stock.sum() == 1  # all four readings differ
    again = readings(CellResult(np.zeros(4, dtype=np.uint8), [said(5, 5, 5)] * 4), asked)
    assert again.stock.tolist() == [1, 1, 1, 1]


def test_digits_that_a_chain_names() -> None:
    assert named_digits(said(3, 12, 15)) == (3, 12)
    for broken in ("", "<think> left 3 so 3 </think>", said(3, 4, 7)[8:]):
        assert named_digits(broken) is None
    assert follows("<image> larger ?", (3, 9)) == 9


def test_poisoned_rollouts_by_hand() -> None:
    """Right by luck, right and seen, wrong and seen."""
    right, wrong = np.array([True, True, False]), np.array([True, False, False])
    found = perception.shares(right, wrong)
    assert found == pytest.approx({"rewarded": 200 / 3, "misread": 100 / 3, "poisoned": 50.0})
    assert perception.shares(~right & right, wrong)["poisoned"] == 0


def test_a_table_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    write("made", over_seeds("training", "roma", "reward", {0: 80.0, 1: 83.0}))
    table = Table("made")
    assert table.entry("training", "roma", "reward") == {"mean": 81.5, "low": 80.0, "high": 83.0}
    assert table.seeds("training", "roma", "reward") == [80.0, 83.0]
    with pytest.raises(ValueError, match=r"made\.csv: expected a row of it, got .*'grpo'"):
        table.entry("training", "grpo", "reward")
    with pytest.raises(ValueError, match=r"results: expected one of made, got 'x'; run make sci"):
        Table("x")


@pytest.mark.parametrize("template", pages.PAGES)
def test_a_document_is_its_template_with_the_numbers_of_the_csv(template: str) -> None:
    document = pages.PAGES[template]
    assert pages.render(template) == document.read_text(encoding="utf-8"), "make science"


def test_the_readme_holds_the_demos_numbers() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.readme(text) == text, "make science"


def test_a_page_follows_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pages.render("SCIENCE.md.j2")
    for path in results.FOLDER.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with (tmp_path / path.name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for row in rows:
                writer.writerow(row | {"mean": float(row["mean"]) + 11})
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    pages.forget()
    try:
        changed = pages.render("SCIENCE.md.j2")
    finally:
        pages.forget()
    pairs = list(zip(before.splitlines(), changed.splitlines(), strict=True))
    tables = [(old, new) for old, new in pairs if old.startswith("|") and "." in old]
    assert tables and all(old != new for old, new in tables)


def test_slips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stage: expected some of severity, .* got 'x'"):
        run_stages(["x"], tmp_path, Console())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"configs: expected configs/demo.yaml here, got none"):
        run_stages([next(iter(STAGES))], tmp_path, Console())


class MadeUp:
    """Stands in for `Runs`: every job is finished at once, with answers that are made up."""

    started: ClassVar[list[Job]] = []

    def __init__(self, console: Console, *, reuse: bool = False) -> None:
        assert reuse  # what is finished is not run again

    def __enter__(self) -> "MadeUp":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def everything(self) -> None:
        pass

    def start(self, job: Job) -> None:
        self.started.append(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(len(self.started))
        share = 0.9 if "roma" in job.arm else 0.5
        cells = {
            cell: CellResult((draw.random(40) < share).astype(np.uint8), [])
            for cell in (Cell(), Cell("seen", "jpeg", 3), Cell("unseen", "speckle", 3))
        }
        EvalResult([str(i) for i in range(40)], cells).save(job.answers)
        if job.config is None:
            return
        steps = job.config.trainer.total_steps
        took = {"steps": steps, "train_cpu_s": 30 * (2.5 if job.arm == "roma" else 1)}
        (job.folder / "took.json").write_text(json.dumps(took))
        rows = [{"step": s, "reward/accuracy": 0.5 if s <= 0.8 * steps else 1.0}
                for s in range(1, steps + 1)]  # fmt: skip
        (job.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_study_from_runs_to_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "Runs", MadeUp)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(Place, "images", lambda self, split: self.folder / split)
    monkeypatch.setattr(MadeUp, "started", [])
    study = STUDIES["bars"]
    made = StudyRun(study, Place(study.task, tmp_path, Console()))
    made.train()
    made.test()
    trained = [job for job in MadeUp.started if job.config is not None]
    assert len(trained) == len(study.arms) * len(study.seeds)
    # GRPO is given ROMA's CPU time: 2.5 times its steps. All are measured as they were trained.
    longer = {job.config.trainer.total_steps for job in trained if job.arm == "grpo_equal_time"}
    usual = {job.config.trainer.total_steps for job in trained if job.arm == "grpo"}
    assert longer == {math.ceil(2.5 * usual.pop())}
    models = [job.model for job in MadeUp.started if job.arm == "grpo_equal_time" and job.model]
    assert all(f"global_step_{longer.copy().pop()}" in str(model) for model in models) and models
    made.write("test")
    table = Table("bars-test")
    own = table.entry("accuracy", "roma", "seen L3")
    seeds = table.seeds("accuracy", "roma", "seen L3")
    assert own["mean"] == pytest.approx(np.mean(seeds), abs=1e-3) and len(seeds) == len(SEEDS)
    difference = table.entry("difference", "roma", "seen L3", against="grpo")
    assert difference["mean"] == pytest.approx(
        own["mean"] - table.entry("accuracy", "grpo", "seen L3")["mean"], abs=2e-3
    )
    assert difference["low"] > 0
    assert table.entry("training", "roma", "reward, last fifth")["mean"] == 100
    assert table.entry("cost", "roma", "cpu_s")["mean"] == 75


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    place = Place(STUDIES["bars"].task, tmp_path, Console())
    path = place.folder / "made.json"
    path.write_text(json.dumps(place.settings()), encoding="utf-8")
    place.prepare()  # made earlier: nothing is done
    assert not place.base.exists()
    path.write_text(json.dumps(place.settings() | {"measured": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="expected runs of these settings, got those of others"):
        place.prepare()
