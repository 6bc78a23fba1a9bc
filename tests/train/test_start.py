"""How a run starts: what it prints, and what is refused before a model is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_model
from support.small_run import config

from roma.models.qwen_vl import Policy
from roma.train.trainer import Trainer, train


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model fails the test."""

    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the model was read")

    monkeypatch.setattr(Policy, "load", read)


def test_the_console_says_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("trainer.logger=[console]", "trainer.total_steps=1")
    given = config(tmp_path, *options, "trainer.device=cpu")
    train(given)
    folder, model, backend, step = capsys.readouterr().out.splitlines()
    assert folder == f"run folder: {tmp_path}"
    assert model == f"model: {given.worker.actor.model_path}, on cpu"
    assert backend.startswith("back end: auto takes ")
    assert step.startswith("step 1/1")
    train(config(tmp_path, *options, "trainer.total_steps=2"))
    resumed = capsys.readouterr().out.splitlines()[0]
    assert resumed == f"run folder: {tmp_path}, from {tmp_path / 'global_step_1'}"


def test_without_the_console_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path, "trainer.total_steps=1"))
    told = capsys.readouterr()
    assert told.out == told.err == ""


def test_a_finished_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    first = train(config(tmp_path, "trainer.total_steps=1"))
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    capsys.readouterr()
    request.getfixturevalue("unread")
    assert train(config(tmp_path, "trainer.total_steps=1")) == first
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        f"nothing left to train: {first} has trainer.total_steps = 1 steps; raise it to go on, or "
        "give trainer.resume=never to start anew\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == kept


def test_changed_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = train(config(tmp_path / "one", "trainer.total_steps=1"))
    train(config(tmp_path / "one", "trainer.total_steps=2", "algorithm.roma.lambda_inv=3"))
    capsys.readouterr()  # a run that goes on in its folder; below, one from elsewhere
    options = ("algorithm.roma.lambda_inv=0.25", "data.limit=7", "trainer.total_steps=2")
    train(config(tmp_path / "two", *options, f"trainer.resume={path}"))
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"changed since {path}: data.limit: null -> 7",
        f"changed since {path}: algorithm.roma.lambda_inv: 3.0 -> 0.25",
    ]
    assert (tmp_path / "two" / "global_step_2").is_dir()


def test_a_damaged_config_does_not_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path, "trainer.total_steps=1"))
    (tmp_path / "config.yaml").write_text("data: {limit: [")
    train(config(tmp_path, "trainer.total_steps=2"))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "are not compared: " in told and "expected YAML" in told
    assert (tmp_path / "global_step_2").is_dir()


@pytest.mark.usefixtures("unread")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU would be taken")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    message = r"trainer\.device: expected a device that torch can use here, got 'cuda' \("
    for start in (train, Trainer):
        with pytest.raises(ValueError, match=message):
            start(config(tmp_path, "trainer.device=cuda"))


@pytest.mark.usefixtures("unread")
def test_a_level_table_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, "algorithm.views.level_table=configs/none.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        train(given)
    looked = tmp_path / "configs" / "none.yaml"
    assert str(caught.value) == (
        f"algorithm.views.level_table: expected a YAML file, got 'configs/none.yaml', and no file "
        f"at {looked}; correct the path, which is relative to the working directory"
    )


@pytest.mark.usefixtures("unread")
def test_views_on_a_gpu_need_the_policy_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"algorithm\.views\.device: expected cpu, as the policy"):
        train(config(tmp_path, "algorithm.views.device=cuda", "trainer.device=cpu"))


@pytest.mark.usefixtures("unread")
def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder with actor, got .*none"):
        train(config(tmp_path, f"trainer.resume={tmp_path / 'none'}"))


def test_a_changed_optimizer_is_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were named as changed, and the checkpoint's went on."""
    train(config(tmp_path, "trainer.total_steps=1", "worker.actor.lr=1e-3"))
    actor = [
        "worker.actor.lr=5e-5",
        "worker.actor.weight_decay=0.2",
        "worker.actor.betas=[0.8,0.9]",
    ]
    resumed = Trainer(config(tmp_path, "trainer.total_steps=2", *actor))
    (group,) = resumed.engine.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (5e-5, 0.2, (0.8, 0.9))
    resumed.fit()
    assert group["lr"] == resumed.engine.lr == 5e-5
    capsys.readouterr()
    other = tmp_path / "other"
    Policy.load(tmp_path / "global_step_1" / "actor").save_pretrained(other)
    train(config(tmp_path, "trainer.total_steps=3", *actor, f"worker.actor.model_path={other}"))
    assert "; the weights are the checkpoint's\n" in capsys.readouterr().err


def test_a_best_metric_that_no_step_logs(tmp_path: Path) -> None:
    """It kept no best checkpoint, without a word."""
    wrong = config(tmp_path, "trainer.best_metric=reward/acuracy", "trainer.total_steps=1")
    with pytest.raises(ValueError, match=r"best_metric: .* did you mean reward/accuracy\?"):
        train(wrong)
    with pytest.raises(ValueError, match=r"val_freq: expected a divisor of trainer\.save_freq"):
        config(tmp_path, "trainer.best_metric=val/accuracy", "trainer.save_freq=3")


def test_a_model_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    """A download that was cut."""
    folder = tmp_path / "model"
    shutil.copytree(small_model.folder() / "model", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model: expected one that loads in ") as told:
        Policy.load(folder)
    assert "\n" not in str(told.value)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"model_type": "qwen99"}))
    with pytest.raises(ValueError, match="model: expected one that loads"):
        Policy.load(folder)
