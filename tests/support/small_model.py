"""An untrained small Qwen3-VL and some of the demo's questions, made once for a test module."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl

from roma.data import DIGIT_WORDS, write_digits
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.models.small import build_small_vlm

_KEPT = TemporaryDirectory()  # removed when the process ends


@lru_cache(maxsize=1)
def folder() -> Path:
    """`model/` and `data/` (train 24, val 8, test 4)."""
    root = Path(_KEPT.name)
    build_small_vlm(root / "model", words=DIGIT_WORDS)
    write_digits(root / "data", train=24, val=8, test=4)
    return root


def policy() -> Policy:
    """A fresh copy of the model."""
    return Policy.load(folder() / "model").eval()


@contextmanager
def exact_norms() -> Iterator[None]:
    """Without transformers' cast to fp32 in the norms."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (
            x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3_vl.Qwen3VLTextRMSNorm, "forward", forward)
        yield


def mixed_prompts(model: Policy) -> PromptBatch:
    """Three prompts of different lengths: one image, two images of different grids, one larger."""
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int):
        return torch.randint(256, (height, width, 3), generator=generator).to(torch.uint8).numpy()

    problems = ["<image> sum ?", "left <image> right <image> larger ?", "so <image> larger sum ?"]
    images = [[image(32, 64)], [image(32, 32), image(64, 48)], [image(61, 70)]]
    return model.encode_prompts(problems, images)


def plain_inputs(model: Policy, prompts: PromptBatch) -> dict[str, torch.Tensor]:
    """The prompts as transformers' own forward and generate take them."""
    kinds = (prompts.input_ids == model.model.config.image_token_id).int()
    return {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "pixel_values": prompts.pixel_values,
        "image_grid_thw": prompts.grids,
        "mm_token_type_ids": kinds,
    }
