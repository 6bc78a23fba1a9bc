"""Images and prompts in the form a Qwen3-VL takes, without torchvision.

transformers' own processor for this family requires a video processor, which requires torchvision.
This one joins the two parts that are needed, transformers' tokenizer and its PIL image processor,
and saves and loads them in the same files. It separates resizing from normalising, because views
are made in between, on uint8 images at model resolution.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_kernels.errors import fail

Image = NDArray[np.uint8]  # [H, W, 3]


class Processor:
    """A tokenizer with a chat template, and an image processor.

    Args:
        tokenizer: a transformers tokenizer with `<|image_pad|>` and the two vision marks in its
            vocabulary.
        image_processor: transformers' `Qwen2VLImageProcessorPil`, which Qwen3-VL uses too.
    """

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        """Keeps both parts."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = "<|image_pad|>"

    @classmethod
    def load(cls, path: str | Path) -> "Processor":
        """Reads both parts from a model's folder.

        Raises:
            ValueError: the folder holds no preprocessor_config.json or tokenizer.
        """
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        for name in ("preprocessor_config.json", "tokenizer_config.json"):
            if not (Path(path) / name).is_file():
                fail(
                    "model",
                    "a Hugging Face vision-language model's folder",
                    f"no {name} in {path}",
                    "check the path",
                )
        return cls(
            AutoTokenizer.from_pretrained(path), Qwen2VLImageProcessorPil.from_pretrained(path)
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Writes both parts to a folder, as `load` and transformers read them."""
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    def resize(self, image: Image) -> Image:
        """The image at the resolution the model sees: sides in whole patches, pixels in range."""
        from transformers.image_utils import SizeDict

        processor = self.image_processor
        size = (
            processor.size if isinstance(processor.size, SizeDict) else SizeDict(**processor.size)
        )
        factor = processor.patch_size * processor.merge_size
        resized = processor.resize(
            image.transpose(2, 0, 1), size=size, resample=processor.resample, factor=factor
        )
        return np.ascontiguousarray(np.clip(resized, 0, 255).astype(np.uint8).transpose(1, 2, 0))

    def pixel_values(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Patches [Σ gh·gw, 3·2·p·p] fp32 and grids [n, 3] of images at model resolution."""
        if not len(images):
            size, channels = self.image_processor.patch_size, 3
            width = channels * self.image_processor.temporal_patch_size * size**2
            return torch.empty(0, width), torch.empty(0, 3, dtype=torch.int64)
        made = self.image_processor(images=list(images), do_resize=False, return_tensors="pt")
        return made["pixel_values"].to(torch.float32), made["image_grid_thw"]

    def prompt_ids(self, problem: str, grids: Tensor) -> list[int]:
        """Token ids of the chat prompt; each `<image>` becomes one image token per merged patch.

        Raises:
            ValueError: the number of `<image>` marks is not the number of grids.
        """
        texts = problem.split("<image>")
        if len(texts) - 1 != len(grids):
            got = f"{len(texts) - 1} marks for {len(grids)} images in {problem[:60]!r}"
            fail("problem", "one `<image>` per image", got, "correct the dataset row")
        content: list[dict[str, str]] = []
        for i, text in enumerate(texts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
        chat = [{"role": "user", "content": content}]
        prompt = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        first, *rest = prompt.split(self.image_token)
        counts = (grids.prod(-1) // self.image_processor.merge_size**2).tolist()
        prompt = first + "".join(
            self.image_token * count + text for count, text in zip(counts, rest, strict=True)
        )
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions [B, T]: counted tokens, without special tokens."""
        rows = [row[on].tolist() for row, on in zip(tokens.cpu(), mask.cpu(), strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
