"""Bringing an image to the size at which a Qwen-VL model sees it, before it is degraded.

Noise on a large photograph is mostly gone once the model's processor has made the photograph
small. At the model's own size what is degraded is what is seen, as in training.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from roma.evaluate.lmms_eval.images import Pixels
from roma_kernels.errors import fail

Sizing = Callable[[int, int], tuple[int, int]]
"""(height, width) to (height, width)."""

_PATCHES = {
    "qwen2_5_vl": 14,
    "qwen3_vl": 16,
    "qwen3_5": 16,
}  # as lmms-eval's classes say to qwen_vl_utils


def check_resize(resize: str | None, name: str) -> None:
    """Holds `resize=` to what `Resizer` can do.

    Args:
        resize: None or "model".
        name: of lmms-eval's model.

    Raises:
        ValueError: another word, or a model whose sizes are not known here.
    """
    if resize not in (None, "model"):
        fail("resize", '"model"', repr(resize), "leave it out for the images' own size")
    if resize and name not in (*_PATCHES, "vllm"):
        expected = f"none with lmms-eval's {name}"
        fail("resize", expected, repr(resize), f"only {', '.join(_PATCHES)} and vllm are known")


class Resizer:
    """Brings images to the size at which a model sees them; what it makes stays as it is.

    Args:
        name: of lmms-eval's model.
        image_processor: transformers' of the checkpoint, of the Qwen-VL kind.

    Raises:
        ValueError: an image processor of another kind.
    """

    def __init__(self, name: str, image_processor: Any) -> None:
        """Collects what the model does to sizes, one after another."""
        kind = type(image_processor).__name__
        if "Qwen2VLImageProcessor" not in kind:
            remedy = "leave out resize=: the sizes of others are not known here"
            fail("resize", "a checkpoint of a Qwen-VL family", kind, remedy)
        self._sizings: list[Sizing] = []
        if name in _PATCHES:
            self._sizings.append(_fetched(2 * _PATCHES[name]))
        if name not in ("qwen3_vl", "qwen3_5"):  # those run their processor with do_resize=False
            self._sizings.append(_processed(image_processor))

    def __call__(self, image: Pixels) -> Pixels:
        """[H, W, 3] uint8, bicubic."""
        size = seen_size(image.shape[:2], self._sizings)
        if size == image.shape[:2]:
            return image
        height, width = size
        return np.array(Image.fromarray(image).resize((width, height)))


def seen_size(size: Sequence[int], sizings: Sequence[Sizing]) -> tuple[int, int]:
    """(height, width) after each of the sizings."""
    height, width = size
    for sizing in sizings:
        height, width = sizing(height, width)
    return height, width


def _fetched(factor: int) -> Sizing:
    """What qwen_vl_utils does when it reads an image."""
    from qwen_vl_utils.vision_process import smart_resize

    def sizing(height: int, width: int) -> tuple[int, int]:
        made: tuple[int, int] = smart_resize(height, width, factor=factor)
        return made

    return sizing


def _processed(image_processor: Any) -> Sizing:
    """What transformers' image processor does."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    factor = image_processor.patch_size * image_processor.merge_size
    low, high = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))

    def sizing(height: int, width: int) -> tuple[int, int]:
        made: tuple[int, int] = smart_resize(
            height, width, factor=factor, min_pixels=low, max_pixels=high
        )
        return made

    return sizing
