"""Images and prompts in the form a Qwen3-VL takes, without torchvision.

transformers' own processor for this family requires a video processor, which requires torchvision.
This one joins the two parts that are needed, transformers' tokenizer and its PIL image processor,
and saves and loads them in the same files. It separates resizing from normalising, because views
are made in between, on uint8 images at model resolution.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_kernels.errors import fail

Image = NDArray[np.uint8]  # [H, W, 3]

THINK = ("<think>", "</think>")


class Processor:
    """A tokenizer with a chat template, and an image processor.

    Args:
        tokenizer: a transformers tokenizer with `<|image_pad|>` and the two vision marks in its
            vocabulary.
        image_processor: transformers' `Qwen2VLImageProcessorPil`, which Qwen3-VL uses too.
        plain_think_tokens: encode `<think>` and `</think>` as the text that they are, also where
            the tokenizer has them as tokens of their own, which Qwen3-VL's Instruct models have
            never learnt. None: unless the chat template writes them itself, as a Thinking model's.
            The saved tokenizer is the one given, either way.

    Raises:
        ValueError: plain_think_tokens is True, and the chat template writes them.
    """

    def __init__(
        self, tokenizer: Any, image_processor: Any, *, plain_think_tokens: bool | None = None
    ) -> None:
        """Keeps both parts."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = "<|image_pad|>"
        added = tokenizer.get_added_vocab()
        self._has_think = any(tag in added for tag in THINK)
        opens = self._has_think and self._template().rstrip().endswith(THINK[0])
        self._opening = THINK[0] if opens else ""
        self._plain: Any = None  # the tokenizer's backend without the two tokens, if they are plain
        if plain_think_tokens is None:
            plain_think_tokens = not (self._has_think and self._template_thinks())
        self.plain_think_tokens = plain_think_tokens

    @property
    def plain_think_tokens(self) -> bool:
        """Whether `<think>` and `</think>` are encoded as the text that they are."""
        return self._plain_think_tokens

    @plain_think_tokens.setter
    def plain_think_tokens(self, plain: bool) -> None:
        self._plain_think_tokens = plain
        self._plain = None
        if not plain or not self._has_think:
            return
        if self._template_thinks():
            got = "a model whose chat template writes <think> itself"
            remedy = "it has learnt the tokens: set it to false"
            fail("data.plain_think_tokens", "a model without reasoning of its own", got, remedy)
        self._plain = _without(self.tokenizer, THINK)

    def _template_thinks(self) -> bool:
        return any(tag in self._template() for tag in THINK)

    def _template(self) -> str:
        """A prompt as the chat template has it."""
        chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        prompt: str = self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        return prompt

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; added tokens in it are tokens, but for the two that are plain."""
        if self._plain is not None and any(tag in text for tag in THINK):
            plain: list[int] = self._plain.encode(text, add_special_tokens=False).ids
            return plain
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

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

    @cached_property
    def _values(self) -> Tensor:
        """[3, 256] fp32: what `pixel_values` makes of each level of each channel."""
        block = self.image_processor.patch_size * self.image_processor.merge_size
        rows = -(-256 // block**2)
        levels = np.arange(rows * block**2, dtype=np.int64).clip(max=255).astype(np.uint8)
        image = np.broadcast_to(levels.reshape(rows * block, block, 1), (rows * block, block, 3))
        made, grids = self.pixel_values([np.ascontiguousarray(image)])
        _, *size = grids[0].tolist()
        return self._planes(made, size)[:, 0].flatten(1)[:, :256]

    @property
    def _frames(self) -> int:
        return int(self.image_processor.temporal_patch_size)

    def patches(self, images: Sequence[Tensor]) -> Tensor:
        """`pixel_values` of images [H, W, 3] uint8, bit for bit, where the tensors are.

        For images that change from pass to pass of a policy. Every frame of a patch is the image.

        Args:
            images: n at model resolution.

        Returns:
            [Σ gh·gw, 3·2·p·p] fp32.
        """
        p, m = self.image_processor.patch_size, self.image_processor.merge_size
        made = []
        for image in images:
            levels, table = image.permute(2, 0, 1).long(), self._values.to(image.device)
            planes = torch.stack([table[c][levels[c]] for c in range(3)])
            rows, columns = (length // p // m for length in image.shape[:2])
            split = planes.view(3, rows, m, p, columns, m, p).permute(1, 4, 2, 5, 0, 3, 6)
            every = split.unsqueeze(5).expand(*split.shape[:5], self._frames, p, p)
            made.append(every.reshape(rows * columns * m * m, -1))
        return torch.cat(made)

    def image_gradients(self, dpatches: Tensor, grids: Tensor) -> list[Tensor]:
        """Gradients by images from those by their patches, frames added up.

        By what `pixel_values` makes of a level: by levels they are a positive factor of these, of
        one size in a channel.

        Args:
            dpatches: [Σ gh·gw, 3·2·p·p].
            grids: [n, 3] int64.

        Returns:
            n of [H, W, 3].
        """
        parts = dpatches.split(grids.prod(-1).tolist())
        sizes = grids[:, 1:].tolist()
        return [
            self._planes(part, size).sum(1).permute(1, 2, 0)
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _planes(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """[gh·gw, 3·f·p·p] of an image as [3, f, H, W]."""
        p, m = self.image_processor.patch_size, self.image_processor.merge_size
        rows, columns = size
        split = patches.view(rows // m, columns // m, m, m, 3, self._frames, p, p)
        return split.permute(4, 5, 0, 2, 6, 1, 3, 7).reshape(3, self._frames, rows * p, columns * p)

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
        return self.encode(prompt)

    def decode(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions [B, T]: counted tokens, without special tokens.

        A Thinking model's template opens the reasoning in the prompt: its tag comes first here, so
        that a text reads the same whoever wrote it.
        """
        rows = [row[on].tolist() for row, on in zip(tokens.cpu(), mask.cpu(), strict=True)]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self._opening + text for text in texts]


def _without(tokenizer: Any, tags: Sequence[str]) -> Any:
    """The backend of a fast tokenizer, to which these added tokens are plain text."""
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        got, remedy = type(tokenizer).__name__, "set data.plain_think_tokens=false"
        fail("tokenizer", "a fast one, to read <think> as plain text", got, remedy)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words, kept = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False), []
    for token in state["added_tokens"]:
        if token["content"] not in tags:
            kept.append(token)
        elif token["content"] not in words:
            # Added tokens are numbered in their order: its place stays taken.
            kept.append({**token, "content": f"\0unused {token['id']}\0"})
    state["added_tokens"] = kept
    made = Tokenizer.from_str(json.dumps(state))
    made.no_truncation()
    made.no_padding()
    return made
