"""The command line: help that teaches, clean lines for slips, arguments that reach functions."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from roma import cli
from roma.train.config import Config, load_config
from roma_kernels.errors import fail

COMMANDS = ("train", "eval", "views", "data", "info", "demo")


class Calls(ModuleType):
    """A module that stands in for a slow one and keeps how its functions were called."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(name)
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setitem(sys.modules, name, self)

    def __getattr__(self, _: str) -> Any:
        """Any function: it notes its arguments."""
        return lambda *args, **options: self.made.append((args, options))


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_teaches(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: {' '.join(('roma', *command))}" in text
    assert command == ("info",) or f"  roma {' '.join(command)}" in text.split("options:")[1]
    assert max(map(len, text.splitlines())) <= 100


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS)


def test_train_hands_over_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = Calls("roma.train.trainer", monkeypatch)
    path = tmp_path / "run.yaml"
    path.write_text("data: {train_files: a}\nworker: {actor: {model_path: m}}\n")
    assert cli.main(["train", str(path), "trainer.total_steps=7"]) == 0
    needed = ["data.train_files=a", "worker.actor.model_path=m", "trainer.total_steps=7"]
    assert cli.main(["train", *needed]) == 0
    assert trainer.made == [((load_config(None, needed),), {})] * 2


def test_print_config_can_be_trained_from(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    needed = ["data.train_files=a", "worker.actor.model_path=m", "worker.actor.lr=3e-4"]
    assert cli.main(["train", "--print-config", *needed]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(None, needed)


def test_lists_of_keys_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--list-keys"]) == 0
    text = capsys.readouterr().out
    assert "worker.actor.lr = 1.0e-06    (a number > 0)\n    Peak learning rate.\n" in text
    assert "algorithm.roma.lambda_inv = 1.0" in text
    assert "    \n" not in text  # no key without a meaning
    assert cli.main(["train", "--list-metrics"]) == 0
    assert "actor/roma_penalty_worst\n    L_inv" in capsys.readouterr().out


def test_data_writes_a_set_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from roma.data import load_dataset_rows

    sizes = ["--train", "3", "--val", "2", "--test", "0", "--seed", "5"]
    assert cli.main(["data", "digits", "--out", str(tmp_path), *sizes]) == 0
    assert capsys.readouterr().out.startswith(f"train: {tmp_path / 'train.parquet'}\nval: ")
    assert len(load_dataset_rows(f"{tmp_path}@train")) == 3
    assert not (tmp_path / "test.parquet").exists()


def test_eval_and_demo_pass_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, demo = (
        Calls("roma.evaluate.run", monkeypatch),
        Calls("experiments.digits.demo", monkeypatch),
    )
    options = ["--pools", "clean,seen", "--levels", "1, 3", "--limit", "9", "--out", "o"]
    assert cli.main(["eval", "model", "data@test", *options]) == 0
    (positional, named) = evaluate.made[0]
    assert positional == ("model", "data@test")
    assert (named["pools"], named["levels"], named["limit"]) == (["clean", "seen"], [1, 3], 9)
    assert cli.main(["demo", "--seeds", "0,1"]) == 0
    assert demo.made == [(("runs/demo",), {"seeds": [0, 1]})]


def test_views(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["views", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "pool corruption L1 L2 L3 L4 L5 training unit".split()
    noise = "seen gaussian_noise 0.08 0.12 0.18 0.26 0.38 0 to 0.12 sigma, pixels in 0..1"
    assert lines[1].split() == noise.split() and len(lines) == 18
    assert cli.main(["views"]) == 2
    assert capsys.readouterr().err.startswith("roma: IMAGE: expected at least one image file")
    table = tmp_path / "levels.yaml"
    table.write_text("jpeg: {levels: [30, 20]}\n")
    gallery = Calls("roma.views.gallery", monkeypatch)
    assert cli.main(["views", "a.jpg", "b/c.png", "--level-table", str(table)]) == 0
    assert [args for args, _ in gallery.made] == [
        (Path("a.jpg"), Path("views-a.png")),
        (Path("b/c.png"), Path("views-c.png")),
    ]
    drawn = gallery.made[0][1]["corruptions"]
    assert drawn["jpeg"].levels == (30, 20) and len(drawn) == 9
    assert cli.main(["views", "a.jpg", "--pools", "extra"]) == 0
    assert set(gallery.made[-1][1]["corruptions"]) > {"fog", "shot_noise"}
    assert cli.main(["views", "a.jpg", "--pools", "seen,rare"]) == 2
    assert "pools: expected one of seen, unseen, extra, got 'rare'" in capsys.readouterr().err


def test_info_asks_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    info = Calls("roma.info", monkeypatch)
    assert cli.main(["info"]) == 0
    assert info.made == [((), {})]


def raising(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Makes `roma train` fail inside."""
    monkeypatch.setitem(cli.__dict__, "_train", action)
    monkeypatch.delenv("ROMA_DEBUG", raising=False)


def test_a_slip_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "trainer.total_stpes=3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "roma: trainer.total_stpes: expected a key of trainer, got an unknown one; "
        "did you mean trainer.total_steps?\n"
    )
    assert cli.main(["train", "nothing.yaml"]) == 2
    assert capsys.readouterr().err.startswith(
        "roma: config: expected a YAML file, got 'nothing.yaml'"
    )


@pytest.mark.parametrize("error", [ValueError, TypeError, ImportError, FileNotFoundError])
def test_errors_worded_by_the_package(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, lambda _: fail("name", "X", "Y", "remedy", error=error))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "roma: name: expected X, got Y; remedy\n"


def test_roma_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, lambda _: fail("name", "X", "Y", "remedy"))
    monkeypatch.setenv("ROMA_DEBUG", "1")
    with pytest.raises(ValueError, match="name: expected X"):
        cli.main(["train"])


def test_an_error_from_elsewhere_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, lambda _: int("not a number"))  # raised in a frame outside the package
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    raising(monkeypatch, interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "roma: interrupted\n"


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "m", "d", "--levels", "1,x"])
    assert "argument --levels: invalid comma-separated int value: '1,x'" in capsys.readouterr().err


def test_the_command_line_loads_no_heavy_package() -> None:
    """--help must not wait for a model library or for DALI."""
    probe = (
        "import sys; from roma import cli; cli.parser().format_help(); "
        "print([m for m in ('transformers', 'nvidia.dali', 'datasets', 'matplotlib', 'yaml') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", probe]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_config_type_is_the_trainers() -> None:
    """What `--list-keys` explains is what `load_config` builds."""
    from roma.train.schema import explain, keys

    leaves = {entry.key for entry in explain(Config)}
    assert leaves <= set(keys(Config))
    assert all(entry.meaning for entry in explain(Config))


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_rich(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    Calls("roma.info", monkeypatch)
    monkeypatch.setattr(sys.modules["roma.info"], "print_info", without_rich, raising=False)
    monkeypatch.setattr(cli, "_is_ours", lambda _: True)  # here the import stands in a test
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == (
        "roma: No module named 'rich'; pip install 'roma[train,views]'\n"
    )
