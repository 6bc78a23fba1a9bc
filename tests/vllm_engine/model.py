"""The small Qwen3-VL with heads of 32, not 24: vLLM's attention on a CPU takes no other near it."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch import Tensor

from roma.data import DIGIT_WORDS
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.models.small import build_small_vlm
from roma.rollout.base import Rollouts

OPTIONS = SimpleNamespace(memory=0.4, sleep=True, dtype="auto", max_sequences=None)
_KEPT = TemporaryDirectory()  # removed when the process ends


def build(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Writes it; `tied`: the head is the embedding."""
    from transformers import AutoConfig, GenerationConfig, Qwen3VLForConditionalGeneration

    build_small_vlm(folder, words=DIGIT_WORDS)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.head_dim = 32
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@lru_cache(maxsize=2)
def folder(tied: bool = False) -> Path:
    """One for the whole process."""
    return build(Path(_KEPT.name) / ("tied" if tied else "plain"), tied=tied)


def policy(tied: bool = False) -> Policy:
    """A fresh copy."""
    return Policy.load(folder(tied)).eval()


def shake(model: Policy, seed: int, size: float = 0.02) -> None:
    """Adds noise to every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))


class Source:
    """A policy that changes, with what a sampler asks: its weights and their version."""

    def __init__(self, tied: bool = False) -> None:
        self.policy, self.version, self.asked, self.left_out = policy(tied), 0, 0, ""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self.asked += 1
        for name, weight in self.policy.model.state_dict().items():
            if not self.left_out or self.left_out not in name:
                yield name, weight

    def change(self, seed: int) -> None:
        shake(self.policy, seed)
        self.version += 1

    def sampler(self):
        from roma.rollout.vllm import VllmSampler

        return VllmSampler(
            self.policy, weights=self.weights, version=lambda: self.version, options=OPTIONS
        )


@torch.no_grad()
def trainer_logits(model: Policy, prompts: PromptBatch, made: Rollouts) -> Tensor:
    """[P·G, T, V]: the logits of completions, as the trainer's forward has them."""
    rows = torch.arange(len(prompts.images))
    rows = rows.repeat_interleave(len(made.tokens) // len(rows))
    features = model.image_features(prompts.pixel_values, prompts.grids)
    hidden = model.completion_hidden(prompts, features, rows, made.tokens, made.mask)
    return hidden @ model.head_weight.T


def mismatch(model: Policy, prompts: PromptBatch, made: Rollouts, temperature: float) -> float:
    """Largest difference between the sampler's log-probs and the trainer's, nats."""
    logp = (trainer_logits(model, prompts, made) / temperature).log_softmax(-1)
    logp = logp.gather(-1, made.tokens[..., None])[..., 0]
    assert made.logp is not None
    return float((logp - made.logp)[made.mask].abs().max())
