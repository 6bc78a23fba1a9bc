"""Checkpoints: what is saved comes back, and no mishap on the way costs the one before."""

import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.tiny_run import TinyModel, TinyPolicy, names
from support.tiny_run import TinyRun as Run
from torch import nn

from roma.train import checkpoint
from roma.train.saved.agree import disk_is_full


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, first = Run(), Run()
    whole.train(10)
    first.train(4)
    first.save(tmp_path, 4)
    second = Run(seed=99)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    assert second.restore(path)["position"] == (3, "epoch")
    second.train(6)
    assert torch.equal(second.weights(), whole.weights())


def test_layout_is_easyr1s(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    path = Run().save(tmp_path / "run", 20)
    assert names(tmp_path / "run") == ["checkpoint_tracker.json", "global_step_20"]
    assert names(path) == [
        "actor",
        "manifest.json",
        "model.json",
        "optimizer.pt",
        "shards",
        "trainer.pt",
    ]
    tracker = json.loads((tmp_path / "run" / "checkpoint_tracker.json").read_text())
    assert tracker == {"last_global_step": 20, "last_actor_path": "global_step_20/actor"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run()
    for step in (2, 9, 10, 11):
        run.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_10", "global_step_11"]
    # A run that branches off earlier drops none of the later ones, least of all its own.
    run.save(tmp_path, 5, keep=1)
    kept = ["checkpoint_tracker.json", "global_step_10", "global_step_11", "global_step_5"]
    assert names(tmp_path) == kept
    assert checkpoint.latest(tmp_path) == tmp_path / "global_step_5"


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path, 3)
    run.train(1)
    run.save(tmp_path, 3)
    other = Run(seed=1)
    other.restore(tmp_path / "global_step_3")
    assert torch.equal(other.weights(), run.weights())
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_3"]


def full(original: Callable[..., None], error: Exception) -> Callable[..., None]:
    """torch.save on a disk that fills up half-way."""

    def write(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        original(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        raise error

    return write


def wrapped() -> RuntimeError:
    """What torch.save raises on a full disk: the cause is in its context only."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    return error


DISK_FULL = {
    "plain": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "torch": wrapped(),
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
}


@pytest.mark.parametrize("target", ["actor", "optimizer.pt", "sync", "tracker"])
@pytest.mark.parametrize("kind", DISK_FULL)
def test_a_full_disk_leaves_the_old_checkpoint_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: str
) -> None:
    run = Run()
    run.train(2)
    run.save(tmp_path, 2)
    before = run.weights()
    run.train(2)
    error = DISK_FULL[kind]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if target == "actor":
            patch.setattr(run.policy, "save_pretrained", fail)
        elif target == "optimizer.pt":
            patch.setattr(torch, "save", full(torch.save, error))
        elif target == "sync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match=r"no space left for checkpoint global_step_4") as caught:
            run.save(tmp_path, 4)
    assert caught.value.errno == errno.ENOSPC
    assert "global_step_2 is untouched" in str(caught.value)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_2"]
    other = Run(seed=1)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    other.restore(path)
    assert torch.equal(other.weights(), before)
    run.save(tmp_path, 4)  # and with space again, the run goes on
    assert checkpoint.latest(tmp_path) == tmp_path / "global_step_4"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a device that is always full")
def test_a_full_device_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real errors of the real writers, on the device that is always full."""
    with pytest.raises((OSError, RuntimeError)) as caught, Path("/dev/full").open("wb") as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    assert disk_is_full(caught.value)
    run, original = Run(), Path.open

    def open_full(path: Path, *args: Any, **options: Any) -> Any:
        return original(
            Path("/dev/full") if path.name == "optimizer.pt" else path, *args, **options
        )

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="there is no earlier one"):
        run.save(tmp_path, 1)
    assert names(tmp_path) == []


def test_another_error_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(run.policy, "save_pretrained", refuse)
    with pytest.raises(PermissionError, match="denied"):
        run.save(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_rename_that_fails_puts_the_replaced_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rename = Run(), Path.rename
    run.save(tmp_path, 3)

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="input/output error"):
        run.save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_3"]


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".global_step_7.partial" / "actor").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None
    Run().save(tmp_path, 8)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_8"]


class OtherModel(TinyModel):
    """Another architecture of the same shapes."""


def frozen() -> TinyModel:
    """The same model with one parameter less to train."""
    model = TinyModel()
    model.head.bias.requires_grad_(False)
    return model


def renamed() -> TinyModel:
    """The same configuration with another shape."""
    model = TinyModel()
    model.head = nn.Linear(4, 11, bias=False)
    return model


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (OtherModel, "architecture is TinyModel in the checkpoint and OtherModel here"),
        (
            lambda: TinyModel(vocab=12),
            "text_config.vocab_size is 11 in the checkpoint and 12 here, and 3",
        ),
        (lambda: TinyModel(heads=1), "text_config.heads is 2 in the checkpoint and 1 here;"),
        (renamed, "shape of head.bias is [11] in the checkpoint and None here"),
        (frozen, "head.bias is trained in the checkpoint and frozen here;"),
    ],
)
def test_a_checkpoint_of_another_model(
    tmp_path: Path, model: Callable[[], TinyModel], difference: str
) -> None:
    path = Run().save(tmp_path, 1)
    other = Run(model=model())
    before = other.weights()
    with pytest.raises(ValueError) as caught:
        other.restore(path)
    assert "global_step_1: expected a checkpoint of this model, got another: " in str(caught.value)
    assert difference in str(caught.value)
    assert torch.equal(other.weights(), before)


def test_a_checkpoint_of_other_words(tmp_path: Path) -> None:
    path = Run().save(tmp_path, 1)
    other = Run()
    other.policy = TinyPolicy(other.policy.model, words=("right", "left"))
    with pytest.raises(ValueError, match=r"got another: vocabulary \(hash\) is \w{12} in the"):
        other.restore(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder with actor, got .*; give"):
        checkpoint.starting_point(tmp_path, str(tmp_path))
    assert checkpoint.starting_point(tmp_path, "auto") is None
    assert checkpoint.starting_point(tmp_path / "none", "auto") is None


def test_every_file_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        seen.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        if self.name == ".global_step_1.partial":
            every = {str(path) for path in self.rglob("*") if path.is_file()}
            assert every and every <= set(seen)
            seen.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    Run().save(tmp_path, 1)
    assert seen.count("renamed") == 1 and seen[-1] == str(tmp_path)


def test_a_checkpoint_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some network file systems do not remove a folder of which a file is open."""
    run = Run()
    run.save(tmp_path, 1)

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", busy)
        run.save(tmp_path, 2, keep=1)
    assert "global_step_1.deleted stays" in capsys.readouterr().err
    run.save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint_tracker.json", "global_step_3"]
