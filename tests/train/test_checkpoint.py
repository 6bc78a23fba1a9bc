"""Checkpoints: what is saved comes back, and no mishap on the way costs the one before."""

import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from roma.train import checkpoint


class TinyConfig:
    """The part of a Hugging Face configuration that a checkpoint reads."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_json_string(self, use_diff: bool = True) -> str:
        """All values; "_name_or_path" and the like say nothing of the model."""
        return json.dumps({**self.values, "_name_or_path": str(id(self)), "dtype": "float32"})


class TinyModel(nn.Module):
    """A head on an embedding, saved as Hugging Face models are."""

    def __init__(self, vocab: int = 11, hidden: int = 4, heads: int = 2) -> None:
        super().__init__()
        text = {"vocab_size": vocab, "hidden_size": hidden, "heads": heads}
        self.config = TinyConfig(text_config=text)
        self.embedding = nn.Embedding(vocab, hidden)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.embedding(tokens))
        return logits

    @classmethod
    def from_pretrained(cls, folder: Path) -> "TinyModel":
        """The model that TinyPolicy saved."""
        stored = torch.load(folder / "weights.pt", weights_only=True)
        text = json.loads((folder / "config.json").read_text())["text_config"]
        model = cls(text["vocab_size"], text["hidden_size"], text["heads"])
        model.load_state_dict(stored)
        return model


class TinyPolicy:
    """What the trainer holds."""

    def __init__(self, model: TinyModel, words: tuple[str, ...] = ("left", "right")) -> None:
        self.model = model
        vocab = {word: at for at, word in enumerate(words)}
        self.processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocab))

    def save_pretrained(self, folder: str | Path) -> None:
        """Two files."""
        with (Path(folder) / "weights.pt").open("wb") as file:
            torch.save(self.model.state_dict(), file)
        (Path(folder) / "config.json").write_text(self.model.config.to_json_string())


class Run:
    """A training run of a few lines."""

    def __init__(self, seed: int = 0, model: TinyModel | None = None) -> None:
        torch.manual_seed(seed)
        self.policy = TinyPolicy(model or TinyModel())
        parameters = [value for value in self.policy.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 / (1 + step)
        )
        self.generator = torch.Generator().manual_seed(seed)

    def train(self, steps: int) -> None:
        """Steps on random tokens."""
        for _ in range(steps):
            tokens = torch.randint(11, (8,), generator=self.generator)
            nn.functional.cross_entropy(self.policy.model(tokens), tokens).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, out: Path, step: int, keep: int | None = None) -> Path:
        """Saves everything that the next step depends on."""
        state = {"step": step, "rng": self.generator.get_state(), "position": (3, "epoch")}
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "state": state}
        return checkpoint.save(out, step, policy=self.policy, keep=keep, **parts)

    def restore(self, path: Path) -> dict[str, Any]:
        """Takes everything back."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        state = checkpoint.restore(path, policy=self.policy, **parts)
        self.generator.set_state(state["rng"])
        return state

    def weights(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([value.detach().reshape(-1) for value in self.policy.model.parameters()])


def names(out: Path) -> list[str]:
    """Everything in a run folder, hidden files included."""
    return sorted(path.name for path in out.iterdir())


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
    assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_layout_is_easyr1s(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    path = Run().save(tmp_path / "run", 20)
    assert names(tmp_path / "run") == ["checkpoint_tracker.json", "global_step_20"]
    assert names(path) == ["actor", "model.json", "optimizer.pt", "trainer.pt"]
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
    "safetensors": checkpoint.SafetensorError(
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
            patch.setattr(checkpoint.os, "fsync", fail)
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
    assert checkpoint._disk_is_full(caught.value)
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
        (frozen, "number of trained parameters is [3] in the checkpoint and [2] here"),
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
        Run().restore(tmp_path)
    run = Run()
    run.save(tmp_path, 1)
    run.save(tmp_path, 2)
    (tmp_path / "global_step_2").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"expected global_step_2 beside it.*\(global_step_1\)"):
        checkpoint.latest(tmp_path)
    (tmp_path / "checkpoint_tracker.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON with last_global_step"):
        checkpoint.latest(tmp_path)
