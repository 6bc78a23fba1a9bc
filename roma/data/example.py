"""One question about images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from roma.models.images import ImageSource, decode_image
from roma_kernels.errors import fail


class RowError(ValueError):
    """A dataset row that cannot be used; the message names file, row and remedy."""


def row_error(origin: str, cause: ValueError) -> RowError:
    """The cause as an error that names the row, and how to skip it."""
    return RowError(f"{origin}: {cause}, or skip such rows: --skip-broken, skip_broken=True")


@dataclass(frozen=True, eq=False)
class Example:
    r"""One question: encoded images, the problem, the answer.

    Attributes:
        id: stable name of the row, the key of its views' seeds.
        images: encoded images, paths or Pillow images; `load_images` decodes them.
        problem: text of the prompt, with one `<image>` per image.
        answer: ground truth, never empty.
        solution: a written response that ends in the answer, for a supervised warm start; None if
            the data has none.
        origin: file and row, for messages.
        question: the data's own text, where a format wrote the problem around it; else the same.
    """

    id: str
    images: Sequence[ImageSource] = field(repr=False)
    problem: str
    answer: str
    solution: str | None = None
    origin: str = "example"
    question: str | None = None

    def __post_init__(self) -> None:
        """Without a question of its own, the problem is it."""
        if self.question is None:
            object.__setattr__(self, "question", self.problem)

    def load_images(self) -> list[NDArray[np.uint8]]:
        """Decodes the images, each to [H, W, 3] uint8 RGB.

        Raises:
            RowError: an image is missing or is not an image; the message names the row.
        """
        named = ((source, f"images[{index}]") for index, source in enumerate(self.images))
        try:
            return [decode_image(source, name=name) for source, name in named]
        except ValueError as error:
            raise row_error(self.origin, error) from error


def image_source(value: Any, folder: Path | None) -> ImageSource:
    """The image of a dataset's cell: {bytes, path}, bytes, a path or a Pillow image.

    Raises:
        ValueError: the cell holds none of these.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | Image.Image):
        return value
    if isinstance(value, str | Path) and str(value):
        return (folder or Path()) / value
    expected = "bytes, a path, {bytes, path} or a Pillow image"
    fail("image", expected, repr(value)[:60], "correct the row")
