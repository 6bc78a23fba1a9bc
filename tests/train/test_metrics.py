"""Loggers: what each writes, what a resumed run keeps, and that no metric goes unexplained."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from roma import METRICS as LOSS_METRICS
from roma.train.metrics import LOGGED, ConsoleLogger, FileLogger, MetricLog, Stopwatch, open_log

STEP = {"reward/overall": torch.tensor(0.75), "actor/loss": 0.5, "timing_s/step": 1.25}


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_of_the_loss_is_explained() -> None:
    assert {f"actor/{name}" for name in LOSS_METRICS} <= LOGGED.keys()
    assert all(LOGGED.values())


@pytest.mark.parametrize("name", ["actor/roma_penalty/jpeg", "reward/accuracy", "timing_s/views"])
def test_names_with_a_free_part(name: str) -> None:
    MetricLog([]).log(1, {name: 0.0})


@pytest.mark.parametrize("name", ["actor/rewrad", "actor/roma_penalty/a/b", "loss", "reward/"])
def test_an_unexplained_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a name in roma\.train\.metrics\.LOGGED"):
        MetricLog([]).log(1, {name: 0.0})


def test_a_stopwatch_keeps_each_stage() -> None:
    clock = Stopwatch()
    with clock.stage("step"):
        for name in ("gen", "views"):
            with clock.stage(name):
                pass
    times = clock.metrics
    assert times.keys() == {"timing_s/step", "timing_s/gen", "timing_s/views"}
    assert 0 <= times["timing_s/gen"] + times["timing_s/views"] <= times["timing_s/step"]


def test_console_prints_one_short_line() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    MetricLog([ConsoleLogger(total_steps=300, console=console)]).log(12, STEP)
    assert text.getvalue() == "step  12/300  reward 0.750  loss 0.500  1.25 s\n"


def test_console_never_wraps() -> None:
    text = io.StringIO()
    values = dict.fromkeys(
        ["reward/overall", "reward/accuracy", "val/accuracy", "actor/loss", "actor/grad_norm"], 0.5
    )
    ConsoleLogger(console=Console(file=text, width=40)).log(1, values)
    assert text.getvalue().count("\n") == 1


def test_file_is_on_disk_at_once(tmp_path: Path) -> None:
    with open_log(["file"], tmp_path / "run") as log:
        log.log(1, {**STEP, "actor/grad_norm": math.inf})
        expected = {"step": 1, "reward/overall": 0.75, "actor/loss": 0.5, "timing_s/step": 1.25}
        assert rows(tmp_path / "run" / "metrics.jsonl") == [{**expected, "actor/grad_norm": None}]


def test_a_resumed_run_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = FileLogger(path)
    for step in range(1, 6):
        log.log(step, {"actor/loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "actor/lo')  # torn by a crash
    resumed = FileLogger(path, resumed_at=3)
    resumed.log(4, {"actor/loss": 40.0})
    resumed.close()
    assert [(row["step"], row["actor/loss"]) for row in rows(path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with open_log(["file"], tmp_path) as log:
            log.log(1, {"actor/loss": 1.0})
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(["tensorboard"], tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"actor/loss": float(step)})
    with open_log(["tensorboard"], tmp_path, resumed_at=3) as log:
        log.log(4, {"actor/loss": 40.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(options)
        ignore = {"define_metric": lambda *_, **__: None, "finish": lambda: None}
        return SimpleNamespace(id="abc", log=logged.append, **ignore)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    out = tmp_path / "digits"
    with open_log(["wandb"], out, config={"seed": 1}) as log:
        log.log(1, STEP)
    open_log(["wandb"], out, resumed_at=1).close()
    open_log(["wandb"], out, experiment="again").close()
    assert logged == [{"step": 1, "reward/overall": 0.75, "actor/loss": 0.5, "timing_s/step": 1.25}]
    assert [(call["id"], call["resume"]) for call in calls] == [
        (None, None),
        ("abc", "allow"),
        (None, None),
    ]
    assert [call["name"] for call in calls] == ["digits", "digits", "again"]
    assert calls[0]["config"] == {"seed": 1}


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"expected the package {package}.*pip install {package}"
    ):
        open_log([package], tmp_path)


def test_an_unknown_logger(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected console, file, tensorboard or wandb, got 'mlflow'"
    ):
        open_log(["mlflow"], tmp_path)
