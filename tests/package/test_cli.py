"""The command line: help that teaches, clean lines for slips, arguments that reach functions."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from roma import cli, info
from roma.train.config import load_config
from roma_kernels.errors import fail

COMMANDS = ("train", "eval", "views", "data", "info")
ROOT = Path(__file__).resolve().parents[2]


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
    assert "\n    demo " not in text  # it needs what a wheel does not have


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"roma-vlm {version('roma-vlm')}\n"


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


def test_example_configurations_are_listed_and_can_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", "--list-configs"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == sorted((ROOT / "configs").glob("*.yaml"))
    needed = ["data.train_files=a", "worker.actor.model_path=m"]
    for path in paths:
        if "levels" not in path.name:
            assert load_config(path, needed).worker.actor.model_path == "m"


def test_data_writes_a_set_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from roma.data import load_dataset_rows

    sizes = ["--train", "3", "--val", "2", "--test", "0", "--seed", "5"]
    assert cli.main(["data", "digits", "--out", str(tmp_path), *sizes]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"train: {tmp_path / 'train.parquet'}\nval: ")
    assert captured.err == "train: 3 rows\nval: 2 rows\n"
    assert len(load_dataset_rows(f"{tmp_path}@train")) == 3
    assert not (tmp_path / "test.parquet").exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl", "hf"])
def test_data_replaces_a_set_only_where_asked(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from roma.data import load_dataset_rows

    def make(split: str, size: int, *more: str) -> int:
        sizes = {"train": 0, "val": 0, "test": 0} | {split: size}
        counts = [word for name, rows in sizes.items() for word in (f"--{name}", str(rows))]
        return cli.main(
            ["data", "digits", "--out", str(tmp_path), "--format", form, *counts, *more]
        )

    assert make("train", 3) == 0
    capsys.readouterr()
    assert make("train", 2) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("roma: out: expected a folder without this set, got ")
    assert captured.err.endswith("; choose another, or overwrite it: --overwrite, overwrite=True\n")
    assert len(load_dataset_rows(f"{tmp_path}@train")) == 3
    # What `datasets` saves lists its splits in one file, so a split more would lose the others.
    assert make("val", 2) == (2 if form == "hf" else 0)
    assert make("train", 2, "--overwrite") == 0
    assert len(load_dataset_rows(f"{tmp_path}@train")) == 2


def test_data_counts_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sizes = ["--train", "150", "--val", "0", "--test", "0"]
    assert cli.main(["data", "digits", "--out", str(tmp_path), *sizes]) == 0
    said = capsys.readouterr().err
    assert said == "\rtrain: 100 of 150 rows\rtrain: 150 of 150 rows\n"


def test_eval_passes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Calls("roma.evaluate.run", monkeypatch)
    options = ["--pools", "clean,seen", "--levels", "1, 3", "--limit", "9", "--out", "o"]
    assert cli.main(["eval", "model", "data@test", *options]) == 0
    (positional, named) = evaluate.made[0]
    assert positional == ("model", "data@test")
    assert (named["pools"], named["levels"], named["limit"]) == (["clean", "seen"], [1, 3], 9)


def test_views(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["views", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "pool corruption L1 L2 L3 L4 L5 training unit".split()
    noise = "seen gaussian_noise 0.08 0.12 0.18 0.26 0.38 0 to 0.12 sigma, pixels in 0..1"
    assert lines[1].split() == noise.split() and len(lines) == 20
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
    assert (
        "pools: expected one of seen, unseen, extra, masking, adversarial, got 'rare'"
        in capsys.readouterr().err
    )


def test_views_never_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from roma.views.gallery import write_gallery

    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "a/one.png", "b/one.png", "c/one-2.png", "views-one.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(name)
    before = Path("photo.png").read_bytes()
    Path("link.png").symlink_to("photo.png")
    for out in ("photo.png", "./a/../photo.png", "link.png"):
        assert cli.main(["views", "photo.png", "--out", out]) == 2
        said = capsys.readouterr().err
        assert said.startswith("roma: --out: expected a name that is no input's, got ")
        with pytest.raises(ValueError, match="out: expected another file than the image"):
            write_gallery("photo.png", out)
    # The gallery of one input under another's name: nothing is drawn.
    assert cli.main(["views", "a/one.png", "views-one.png"]) == 2
    assert capsys.readouterr().out == ""
    assert Path("photo.png").read_bytes() == before

    gallery = Calls("roma.views.gallery", monkeypatch)
    assert cli.main(["views", "a/one.png", "b/one.png", "c/one-2.png", "--out", "v.png"]) == 0
    outs = [str(args[1]) for args, _ in gallery.made]
    assert outs == ["v-one.png", "v-one-2.png", "v-one-2-2.png"]


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
    def elsewhere(_: object) -> None:  # a `raise`, but not one of the package
        raise ValueError("of a reward function, say")

    raising(monkeypatch, elsewhere)
    with pytest.raises(ValueError, match="of a reward function"):
        cli.main(["train"])


@pytest.mark.parametrize("package", ["roma", "roma_kernels"])
@pytest.mark.parametrize(
    "bug",
    [
        "int('not a number')",
        "first, second = (1, 2, 3)",
        "len(3)",
        "import roma.nosuch",
        "import roma_kernels.nosuch",
        "list(zip([1], [], strict=True))",
        "sum([1, 'a'])",
    ],
)
def test_a_bug_of_the_package_keeps_its_traceback(
    package: str, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code in a file of ours, but not a `raise` statement that words the error."""
    raising(monkeypatch, code_of(package, bug))
    with pytest.raises((ValueError, TypeError, ImportError)):
        cli.main(["train"])


@pytest.mark.parametrize("package", ["roma", "roma_kernels"])
def test_a_raise_of_either_package_is_one_line(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, code_of(package, "raise ValueError('x: expected a, got b; c')"))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "roma: x: expected a, got b; c\n"


def code_of(package: str, statement: str) -> Any:
    """A function that runs a statement as if it stood in a file of a package."""
    file = Path(sys.modules[package].__path__[0]) / "somewhere.py"
    scope: dict[str, Any] = {}
    exec(compile(f"def run(_):\n    {statement}\n", str(file), "exec"), scope)
    return scope["run"]


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    raising(monkeypatch, interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "roma: interrupted\n"
    monkeypatch.setattr("roma.cli.evaluation._eval", interrupt)
    assert cli.main(["eval", "model", "data"]) == 130
    assert capsys.readouterr().err == "roma: interrupted; the same command goes on\n"


def test_a_reader_that_stops_early_is_no_error() -> None:
    line = [sys.executable, "-m", "roma", "views", "--list"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        ran.stdout.close()  # as `head` does
        assert (ran.stderr.read(), ran.wait()) == (b"", 141)


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "m", "d", "--levels", "1,x"])
    assert "argument --levels: invalid comma-separated int value: '1,x'" in capsys.readouterr().err


def test_help_needs_the_standard_library_alone() -> None:
    """In under 0.3 s, of which importing torch would take four times as much."""
    probe = (
        "import sys; from roma import cli; cli.parser().format_help()\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names) - {'__main__'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", probe]  # -S: without the hook of an editable install
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("roma\n", "")


def site_without(tmp_path: Path, *distributions: str) -> str:
    """PYTHONPATH of this checkout and of what is installed, but for some packages."""
    installed = Path(sys.modules["torch"].__path__[0]).parent
    for entry in installed.iterdir():
        if entry.name.partition("-")[0] not in distributions and not entry.suffix == ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    return os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))


def command(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m roma` in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    line = [sys.executable, "-S", "-m", "roma", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"mm", "addmm"}, "bf16 into fp32 by mm and addmm"),
        ({"mm"}, "bf16 into fp32 by mm"),
        (set(), "bf16 products are upcast"),
    ],
)
def test_info_tells_which_products_a_gpu_has(
    known: set[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library cannot multiply 16 bits into fp32, copies are made: not in silence."""
    about = SimpleNamespace(name="X", major=9, minor=0, total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(info, "widens", lambda operation, device, dtype: operation in known)
    assert info._describe_gpu(0) == f"0: X, sm_90, 64 GiB; {said}"


def test_without_numpy_info_says_nothing_of_torchs_trouble(tmp_path: Path) -> None:
    path = site_without(tmp_path, "numpy", "numpy.libs")
    probe = [sys.executable, "-S", "-c", "import torch"]
    plain = subprocess.run(
        probe, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "Failed to initialize NumPy" in plain.stderr  # otherwise this test proves nothing
    done = command(path, "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^NumPy +- +views, data: pip install", done.stdout, re.MULTILINE)


def test_a_missing_package_names_the_extras(tmp_path: Path) -> None:
    done = command(site_without(tmp_path, "rich"), "eval", "model", "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "roma: No module named 'rich'; pip install 'roma-vlm[train,views]'\n"
