"""A small Qwen3-VL and a small set of questions, made on the spot: for the example and the tests.

With your own model and data you need neither.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.processing_utils import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from roma.models.small import build_small_vlm

PATTERNS = ("across", "down", "slanted", "plain")  # which way the stripes of a picture run
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


class ImageProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor for images alone: its own wants torchvision, for videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Without the video processor."""
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        """As the original, without videos."""
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.video_processor = None
        template = kwargs.get("chat_template") or tokenizer.chat_template
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=template)


def processor(folder: Path) -> ImageProcessor:
    """The processor of a folder that `model` wrote."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = TEMPLATE
    return ImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer)


def model(folder: Path, *, seed: int = 0) -> Path:
    """Writes a Qwen3-VL of 0.6 M random parameters that knows the words of the task."""
    words = ["which", "way", "do", "the", "stripes", "run", "say", "are", "they", *PATTERNS]
    return build_small_vlm(folder, words=words, seed=seed)


def warm_start(folder: Path, *, steps: int = 20, batch: int = 16) -> None:
    """Some supervised steps, so that the model looks at its image before it is rewarded."""
    network, reader = Qwen3VLForConditionalGeneration.from_pretrained(folder), processor(folder)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(steps):
        rows = stripes(batch, seed=1000 + step)
        prompts = [prepare_multimodal_messages(r["prompt"], images=r["images"]) for r in rows]
        texts = reader.apply_chat_template(prompts, add_generation_prompt=True)
        texts = [
            f"{text} {row['answer']} <|im_end|>" for text, row in zip(texts, rows, strict=True)
        ]
        inputs = reader(text=texts, images=[row["images"] for row in rows], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        network(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)


def stripes(rows: int, *, seed: int = 0, modes: tuple[str, ...] = ("RGB",)) -> Dataset:
    """Questions about fine stripes, which a smaller image hides.

    Args:
        rows: number of questions.
        seed: of the pictures.
        modes: Pillow's modes, in turn.
    """
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    phases = {"across": y, "down": x, "slanted": x + y, "plain": 0 * x}
    prompts, images, answers = [], [], []
    for number in range(rows):
        name = str(draw.choice(PATTERNS))
        waves = 30 * np.sin(np.pi / 2 * (phases[name] + draw.integers(4)) + 0.5)
        grey = 128 + waves[..., None] + draw.normal(0, 12, (48, 64, 3))
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        images.append([picture.convert(modes[number % len(modes)])])
        prompts.append([{"role": "user", "content": "which way do the stripes run"}])
        answers.append(name)
    return Dataset.from_dict({"prompt": prompts, "images": images, "answer": answers})


def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the completion begins with the answer's word."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.split()[:1] == [right]) for text, right in zip(texts, answer, strict=True)]
