"""A small Qwen3-VL and a small set of questions, made on the spot: for the example and the tests.

With your own model and data you need neither.
"""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from roma.models.small import build_small_vlm

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "white": (240, 240, 240),
}
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
    words = ["which", "colour", "is", "the", "square", "are", "squares", "say", *COLOURS]
    return build_small_vlm(folder, words=words, seed=seed)


def squares(rows: int, *, seed: int = 0, modes: tuple[str, ...] = ("RGB",)) -> Dataset:
    """Questions about the colour of a square on a grey ground.

    Args:
        rows: number of questions.
        seed: of the pictures.
        modes: Pillow's modes, in turn.
    """
    draw = np.random.default_rng(seed)
    prompts, images, answers = [], [], []
    for number in range(rows):
        name = str(draw.choice(list(COLOURS)))
        pixels = draw.integers(90, 130, (48, 64, 3), dtype=np.uint8)
        top, left = draw.integers(0, 24), draw.integers(0, 40)
        pixels[top : top + 24, left : left + 24] = COLOURS[name]
        images.append([Image.fromarray(pixels).convert(modes[number % len(modes)])])
        prompts.append([{"role": "user", "content": "which colour is the square"}])
        answers.append(name)
    return Dataset.from_dict({"prompt": prompts, "images": images, "answer": answers})


def accuracy(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the answer's word is in the completion."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(right in text.split()) for text, right in zip(texts, answer, strict=True)]
