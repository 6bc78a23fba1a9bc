"""A training run of a few lines, to save and to resume: an embedding, a head, AdamW."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    def from_pretrained(cls, folder: Path) -> TinyModel:
        """The model that TinyPolicy saved."""
        stored = torch.load(folder / "weights.pt", weights_only=True)
        text = json.loads((folder / "config.json").read_text())["text_config"]
        model = cls(text["vocab_size"], text["hidden_size"], text["heads"])
        model.load_state_dict(stored)
        return model


class TinyPolicy:
    """What the trainer holds."""

    has_adapters = False

    def __init__(self, model: TinyModel, words: tuple[str, ...] = ("left", "right")) -> None:
        self.model = model
        vocab = {word: at for at, word in enumerate(words)}
        self.processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: vocab))

    def save_pretrained(self, folder: str | Path) -> None:
        """Two files."""
        checkpoint.write_tensors(Path(folder) / "weights.pt", self.model.state_dict())
        (Path(folder) / "config.json").write_text(self.model.config.to_json_string())


class TinyEngine:
    """What holds weights and optimizer."""

    def __init__(self, policy: TinyPolicy) -> None:
        self.policy = policy
        self.parameters = dict(policy.model.named_parameters())
        trained = [value for value in self.parameters.values() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)

    def save(self, folder: Path) -> None:
        """One file in the checkpoint and one below it."""
        (folder / "shards").mkdir()
        state = {"optimizer": self.optimizer.state_dict()}
        checkpoint.write_tensors(folder / "optimizer.pt", state)
        (folder / "shards" / "rank_0").write_text("nothing")

    def load(self, folder: Path) -> None:
        """The optimizer."""
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])

    def export(self, folder: Path) -> None:
        """The weights."""
        self.policy.save_pretrained(folder)

    @torch.no_grad()
    def put(self, weight: nn.Parameter, whole: Tensor) -> None:
        """A copy."""
        weight.copy_(whole)


class TinyRun:
    """A run of steps on random tokens, each a function of the generator's state alone."""

    def __init__(self, seed: int = 0, model: TinyModel | None = None) -> None:
        torch.manual_seed(seed)
        self.policy = TinyPolicy(model or TinyModel())
        self.engine = TinyEngine(self.policy)
        self.generator = torch.Generator().manual_seed(seed)

    def train(self, steps: int) -> None:
        """Steps on random tokens."""
        for _ in range(steps):
            tokens = torch.randint(11, (8,), generator=self.generator)
            nn.functional.cross_entropy(self.policy.model(tokens), tokens).backward()
            self.engine.optimizer.step()
            self.engine.optimizer.zero_grad()

    def save(self, out: Path, step: int, keep: int | None = None, **options: Any) -> Path:
        """Saves everything that the next step depends on; `metrics` go into the state."""
        state = {"step": step, "rng": self.generator.get_state(), "position": (3, "epoch")}
        state["metrics"] = options.pop("metrics", {})
        parts: dict[str, Any] = {"engine": self.engine, "policy": self.policy, "state": state}
        return checkpoint.save(out, step, keep=keep, **parts, **options)

    def restore(self, path: Path) -> dict[str, Any]:
        """Takes everything back."""
        state = checkpoint.restore(path, engine=self.engine, policy=self.policy)
        self.generator.set_state(state["rng"])
        return state

    def weights(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([value.detach().reshape(-1) for value in self.policy.model.parameters()])


def names(out: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in out.iterdir())
