"""Bringing an image to the size at which a Qwen-VL model sees it, before it is degraded."""

from collections.abc import Callable
from pathlib import Path

from roma.evaluate.lmms_eval.images import Pixels
from roma_kernels.errors import fail


def resizer_of(
    resize: str | None, name: str, pretrained: str | Path | None
) -> Callable[[Pixels], Pixels] | None:
    """TODO."""
    if resize is not None:
        fail("resize", "none", repr(resize), "leave it out")
    return None
