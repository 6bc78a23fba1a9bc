"""A small Qwen3-VL of a variant's sizes, and the batch of its layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.layout import AROUND, Layout
from bench.variants import Variant
from roma import RomaConfig
from roma.models.qwen_vl import Policy
from roma.models.small import MERGE, PATCH, SPECIAL, build_small_vlm
from roma.train.batch import UpdateBatch
from roma.train.update import PolicyLoss

HEADS = 4
WIDER = 8 / 3  # an MLP's inner size over the hidden size
TOKEN = PATCH * MERGE  # pixels of an image token's side


@dataclass(frozen=True)
class Made:
    """What all candidates of a variant share."""

    folder: Path
    """The model as a Hugging Face folder."""
    policy: Policy
    batch: UpdateBatch
    layout: Layout


def make(variant: Variant, folder: Path, device: str) -> Made:
    """A model with random weights, and a batch: random images, words and advantages.

    Half of the rollouts of each prompt are right, or the variant's share. Advantages are normal, so
    all rollouts learn. Old log-probs are near the policy's own, so no ratio is clipped.
    """
    layout = Layout.of(variant.what)
    words = [f"w{i}" for i in range(variant.vocab - 1 - len(SPECIAL))]
    _model(variant, layout, words, folder)
    policy = Policy.load(folder).to(device).eval()
    drawn = np.random.default_rng(0)
    rows, columns = layout.grid
    shape = (1, rows * TOKEN, columns * TOKEN, 3)
    images = [drawn.integers(0, 256, shape, dtype=np.uint8) for _ in range(layout.prompts)]
    text = " ".join(words[: layout.prompt - layout.image - AROUND])
    prompts = policy.encode_prompts([f"<image> {text}"] * layout.prompts, [list(x) for x in images])
    views = [
        policy.view_pixels(prompts, [[image // (2 + k) for image in own] for own in prompts.images])
        for k in range(variant.views)
    ]
    generator = torch.Generator().manual_seed(0)
    count, width = layout.prompts * layout.rollouts, layout.completion
    numbers = torch.arange(count)
    # Words only: an image's placeholder among the tokens would ask for an image.
    ids = torch.tensor(policy.processor.tokenizer.convert_tokens_to_ids(words))
    batch = UpdateBatch(
        prompts=prompts,
        view_pixels=views,
        group=numbers // layout.rollouts,
        tokens=ids[torch.randint(len(ids), (count, width), generator=generator)],
        mask=torch.arange(width) < torch.tensor(layout.lengths)[:, None],
        advantages=torch.randn(count, generator=generator),
        correct=numbers % layout.rollouts < variant.right * layout.rollouts,
        aux_view=torch.randint(variant.views, (count,), generator=generator) if views else None,
        old_logp=None,
    )
    noise = 0.02 * torch.randn((count, width), generator=generator)
    old = PolicyLoss(policy, RomaConfig()).score(batch).logp
    if layout.checkpointed:
        checkpoint(policy.model)
    batch = replace(batch, old_logp=old + noise.to(old.device))
    return Made(folder, policy, batch, layout)


def one_row_each(batch: UpdateBatch) -> UpdateBatch:
    """The batch with a prompt, and so a vision pass, of its own for each rollout."""
    own: list[int] = batch.group.tolist()
    return replace(
        batch,
        prompts=batch.prompts.select(own),
        view_pixels=[batch.prompts.gather(pixels, own) for pixels in batch.view_pixels],
        group=torch.arange(len(own), device=batch.group.device),
    )


def checkpoint(model: Any) -> None:
    """Has a model's layers run again in the backward pass; they ask whether it trains."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()


def _model(variant: Variant, layout: Layout, words: list[str], folder: Path) -> None:
    """The small model of the demo, at the variant's width, depth and vocabulary."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    build_small_vlm(folder, words=words)
    config = AutoConfig.from_pretrained(folder)
    text, width = config.text_config, variant.depth
    text.hidden_size = config.vision_config.out_hidden_size = width
    text.intermediate_size = int(width * WIDER)
    text.num_hidden_layers = layout.layers
    text.num_attention_heads = text.num_key_value_heads = HEADS
    text.head_dim = width // HEADS
    text.max_position_embeddings = layout.prompt + layout.completion
    third = text.head_dim // 6
    text.rope_parameters["mrope_section"] = [text.head_dim // 2 - 2 * third, third, third]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
