"""Loggers: what each writes, what a resumed run keeps, and that no metric goes unexplained."""

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from roma import METRICS as LOSS_METRICS
from roma.train.alarms import Alarms
from roma.train.config import load_config
from roma.train.loggers import ConsoleLogger, FileLogger, JsonLines, open_log
from roma.train.metrics import LOGGED, MetricLog, Stopwatch, memory, peak_memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "METRICS.md"
STEP = {"reward/overall": torch.tensor(0.75), "actor/loss": 0.5, "timing_s/step": 1.25}


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_of_the_loss_is_explained() -> None:
    assert {f"actor/{name}" for name in LOSS_METRICS} <= LOGGED.keys()
    assert all(LOGGED.values())


def table(heading: str) -> list[list[str]]:
    """The rows of the table of METRICS.md that begins with a cell, without its head."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]


def test_the_page_explains_every_metric_with_the_same_formula() -> None:
    rows = table("metric")
    assert {name.strip("`"): formula for name, formula, _, _ in rows} == LOGGED
    assert len(rows) == len(LOGGED)
    assert all(len(row) == 4 and all(row) for row in rows)


def test_the_page_has_every_alarm() -> None:
    needed = ["data.train_files=d", "worker.actor.model_path=m"]
    control = ["algorithm.control.target=penalty", "algorithm.control.value=0.01"]
    runs = [load_config(None, needed + more) for more in (control, ["algorithm.view_mode=papo"])]
    found = {number.name: number for run in runs for number in Alarms(run)._watched}
    named = {name for row in table("alarm") for name in re.findall(r"`([^`]+)`", row[0])}
    assert named == found.keys()
    alarms = sum(len(number.alarms) for number in found.values())
    assert sum(row[0].count("`") // 2 for row in table("alarm")) == alarms


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


def screen(width: int = 120) -> tuple[Console, io.StringIO]:
    """A terminal that keeps what it is sent, without colours."""
    text = io.StringIO()
    return Console(file=text, width=width, force_terminal=True, color_system=None), text


def test_a_terminal_has_a_bar_in_the_place_of_lines(tmp_path: Path) -> None:
    console, text = screen()
    with open_log(["console"], tmp_path, total_steps=9, resumed_at=3, console=console) as log:
        more = {"perf/tokens_per_second": 1234.0, "perf/memory_mib": 2048.0}
        log.log(4, {**STEP, **more})
        log.log(5, {**STEP, **more, "val/accuracy": 0.5})
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text.getvalue())
    shown = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    last = shown[-1]
    assert re.match(r"step 5/9 .* reward 0\.750  1,234 tokens/s  2,048 MiB  1\.2 s ", last)
    assert last.rstrip().endswith("left")
    above = [line for line in shown if "val/" in line]
    assert [line.rstrip() for line in above] == ["step 5  val/accuracy 0.500"]
    assert not any(line.startswith("step 4  ") for line in shown)


def test_without_a_terminal_there_is_no_bar(tmp_path: Path) -> None:
    text = io.StringIO()
    with open_log(["console"], tmp_path, total_steps=9, console=Console(file=text)) as log:
        log.log(4, STEP)
    assert text.getvalue() == "step 4/9  reward 0.750  loss 0.500  1.25 s\n"


def test_warnings_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    MetricLog([]).warn(["step 3: a", "step 3: b"])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: step 3: a\nwarning: step 3: b\n")


def test_only_the_active_rank_writes(tmp_path: Path) -> None:
    out, every = tmp_path / "run", ["console", "file", "tensorboard", "wandb", "trackio"]
    with open_log(every, out, active=False) as log:
        log.log(1, STEP)
        with pytest.raises(ValueError, match="metric"):
            log.log(1, {"nothing": 0.0})
    assert not out.exists()


def test_memory_is_that_of_the_process() -> None:
    cpu = torch.device("cpu")
    before = memory(cpu)
    kept = torch.ones(64 * 2**18)  # 64 MiB, written to
    held = memory(cpu)
    assert 60 < held - before < 80 and held <= peak_memory(cpu) + 1
    assert before > 50 and len(kept)


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


def test_trackio_goes_on_with_the_run_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(
            log=lambda values, step: logged.append((values, step)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    out = tmp_path / "digits"
    with open_log(["trackio"], out, config={"seed": 1}) as log:
        log.log(3, STEP)
    open_log(["trackio"], out, resumed_at=1).close()
    open_log(["trackio"], out, experiment="again", project="p").close()
    assert logged == [({"reward/overall": 0.75, "actor/loss": 0.5, "timing_s/step": 1.25}, 3)]
    assert [(c["project"], c["name"], c["resume"]) for c in calls] == [
        ("roma", "digits", "never"),
        ("roma", "digits", "allow"),
        ("p", "again", "never"),
    ]
    assert calls[0]["config"] == {"seed": 1}


@pytest.mark.parametrize("package", ["wandb", "tensorboard", "trackio"])
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
        ValueError, match="expected console, file, tensorboard, wandb or trackio, got 'mlflow'"
    ):
        open_log(["mlflow"], tmp_path)


def test_lines_with_odd_characters_survive_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    texts = ["one\u2028two", "lone \ud800", "next\u0085line"]
    first = JsonLines(path)
    for step, text in enumerate(texts, 1):
        first.write(step, [{"text": text}])
    first.close()
    JsonLines(path, resumed_at=2).close()
    kept = [json.loads(line)["text"] for line in path.read_text().split("\n") if line]
    assert kept == texts[:2]
