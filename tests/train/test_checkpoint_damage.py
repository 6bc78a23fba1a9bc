"""A damaged file is found before anything is used, and the newest whole checkpoint is taken."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_run import TinyRun, names

from roma.train.checkpoint import latest, starting_point
from roma.train.saved import folders, manifest

FILES = [
    "actor/config.json",
    "actor/weights.pt",
    "manifest.json",
    "model.json",
    "optimizer.pt",
    "shards/rank_0",
    "trainer.pt",
]


def flip(path: Path, bit: int) -> None:
    """Turns one bit of a file round."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


KINDS: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n\0"),
    "flipped": lambda path: flip(path, 8 * (path.stat().st_size // 2)),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


def two(out: Path) -> TinyRun:
    """A run of four steps with two checkpoints."""
    run = TinyRun()
    for step in (2, 4):
        run.train(2)
        run.save(out, step)
    return run


def test_every_file_is_in_the_manifest(tmp_path: Path) -> None:
    two(tmp_path)
    written = manifest.files_of(tmp_path / "global_step_4")
    assert sorted(written) == FILES
    listed = json.loads((tmp_path / "global_step_4" / "manifest.json").read_text())
    assert list(listed["files"]) == [name for name in FILES if name != "manifest.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    two(tmp_path)
    damaged = tmp_path / "global_step_4"
    KINDS[kind](damaged / name)
    assert starting_point(tmp_path, "auto") == tmp_path / "global_step_2"
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"{damaged} is damaged ({name}: ")
    assert told.err.endswith("): global_step_2 is taken\n")
    with pytest.raises(ValueError) as caught:
        starting_point(tmp_path, str(damaged))
    assert str(caught.value).startswith(f"{damaged}: expected a whole checkpoint, got a damaged ")
    assert f"({name}: " in str(caught.value) and "\n" not in str(caught.value)
    run = TinyRun(seed=1)  # and it goes on from there
    run.restore(tmp_path / "global_step_2")
    run.train(2)
    run.save(tmp_path, 4)
    assert starting_point(tmp_path, "auto") == damaged


def test_any_bit(tmp_path: Path) -> None:
    """A hundred of all bits of a checkpoint, and whole again it is taken again."""
    two(tmp_path)
    path, drawn = tmp_path / "global_step_4", random.Random(0)
    sizes = {name: (path / name).stat().st_size for name in FILES}
    for _ in range(100):
        name = drawn.choice(FILES)
        bit = drawn.randrange(8 * sizes[name])
        flip(path / name, bit)
        assert (manifest.damage(path) or "").startswith(f"{name}: "), f"bit {bit} of {name}"
        flip(path / name, bit)
        assert manifest.damage(path) is None


def test_all_are_damaged(tmp_path: Path) -> None:
    """Then a run does not start anew by itself."""
    two(tmp_path)
    for step in (2, 4):
        (tmp_path / f"global_step_{step}" / "trainer.pt").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        starting_point(tmp_path, "auto")
    assert str(caught.value) == (
        f"{tmp_path}: expected a whole checkpoint, got 2 damaged, the newest one global_step_4 "
        "(trainer.pt: empty); put the file back, or start anew with trainer.resume=never"
    )
    assert starting_point(tmp_path, "never") is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"last_global_step": "x"}'])
def test_without_a_tracker_the_folders_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    two(tmp_path)
    tracker = tmp_path / "checkpoint_tracker.json"
    tracker.unlink() if text is None else tracker.write_text(text)
    how = "missing" if text is None else "damaged"
    assert starting_point(tmp_path, "auto") == latest(tmp_path) == tmp_path / "global_step_4"
    assert capsys.readouterr().err == f"{tracker} is {how}: the newest checkpoint is looked for\n"


def test_the_tracked_one_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two(tmp_path)
    (tmp_path / "global_step_4").rename(tmp_path / "elsewhere")
    assert starting_point(tmp_path, "auto") == tmp_path / "global_step_2"
    line = "names global_step_4, which is missing: one before is taken\n"
    assert capsys.readouterr().err.endswith(line)
    (tmp_path / "global_step_2").rename(tmp_path / "global_step_6")  # of another branch
    with pytest.raises(ValueError, match=r"expected global_step_4 beside it.*\(global_step_6\)"):
        starting_point(tmp_path, "auto")
    (tmp_path / "checkpoint_tracker.json").write_text("{")
    (tmp_path / "global_step_6").rename(tmp_path / "there")
    with pytest.raises(ValueError, match="expected JSON with last_global_step"):
        starting_point(tmp_path, "auto")


def test_the_tracker_rules(tmp_path: Path) -> None:
    """A run that branched off goes on, although another one came further."""
    run = two(tmp_path)
    run.save(tmp_path, 3)
    assert starting_point(tmp_path, "auto") == tmp_path / "global_step_3"


def as_of_old(path: Path) -> None:
    """Takes away what earlier versions did not write."""
    (path / "manifest.json").unlink()
    identity = json.loads((path / "model.json").read_text())
    del identity["format"], identity["frozen"]
    (path / "model.json").write_text(json.dumps(identity))


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_checkpoint_of_an_earlier_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: str
) -> None:
    run = two(tmp_path)
    path = tmp_path / "global_step_4"
    as_of_old(path)
    assert starting_point(tmp_path, str(path) if resume == "path" else resume) == path
    line = f"{path} is of an earlier version and has no manifest.json: its files are not verified\n"
    assert capsys.readouterr().err == line
    other = TinyRun(seed=1)
    other.restore(path)
    assert torch.equal(other.weights(), run.weights())
    frozen = TinyRun()
    frozen.engine.optimizer.param_groups[0]["params"].pop()
    frozen.policy.model.head.bias.requires_grad_(False)
    message = "got another: number of trained parameters is 3 in the checkpoint and 2 here"
    with pytest.raises(ValueError, match=message):
        frozen.restore(path)


@pytest.mark.parametrize("name", ["trainer.pt", "optimizer.pt", "actor", "model.json"])
def test_of_an_earlier_version_what_shows_is_found(tmp_path: Path, name: str) -> None:
    two(tmp_path)
    path = tmp_path / "global_step_4"
    as_of_old(path)
    cut = path / name
    if cut.suffix == ".pt":
        cut.write_bytes(cut.read_bytes()[:-200])
    else:
        cut.rename(tmp_path / "elsewhere")
    assert starting_point(tmp_path, "auto") == tmp_path / "global_step_2"
    with pytest.raises(ValueError, match=name):
        starting_point(tmp_path, str(path))


def test_the_best_is_kept(tmp_path: Path) -> None:
    run = TinyRun()
    values = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.1, 5: None, 6: float("nan"), 7: 0.3}
    kept = {1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [3, 5], 6: [3, 6], 7: [3, 7]}
    for step, value in values.items():
        metrics = {} if value is None else {"val/accuracy": value}
        run.save(tmp_path, step, keep=1, metrics=metrics, best_of="val/accuracy")
        assert folders.steps_in(tmp_path) == kept[step]
    tracker = json.loads((tmp_path / "checkpoint_tracker.json").read_text())
    expected = {"best_global_step": 3, "best_metric": "val/accuracy", "best_value": 0.7}
    assert {key: tracker[key] for key in expected} == expected
    assert tracker["last_global_step"] == 7
    (tmp_path / "global_step_3" / "trainer.pt").write_bytes(b"")  # its value cannot be read
    run.save(tmp_path, 8, keep=1, metrics={"val/accuracy": 0.2}, best_of="val/accuracy")
    assert folders.steps_in(tmp_path) == [7, 8]
    run.save(tmp_path, 9, keep=1, best_of="val/other")  # none has it
    assert folders.steps_in(tmp_path) == [9]
    assert "best_global_step" not in (tmp_path / "checkpoint_tracker.json").read_text()


def test_what_is_resumed_from_stays(tmp_path: Path) -> None:
    run = TinyRun()
    run.save(tmp_path, 1)
    for step in (2, 3, 4):
        run.save(tmp_path, step, keep=1, resumed_from=tmp_path / "." / "global_step_1")
        assert folders.steps_in(tmp_path) == [1, step]
    run.save(tmp_path, 5, keep=1)  # another process, which went on from 4
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_5"]


def test_files_are_shared_by_size() -> None:
    sizes = {f"file {i}": (i * 7919) % 1000 for i in range(50)}
    parts = [manifest.share(sizes, rank, 4) for rank in range(4)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values()) / 10
