"""Reads image files as RGB arrays, for datasets and for `roma views`."""

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from roma_kernels.errors import fail

ImageSource = bytes | Path | Image.Image

# What Pillow raises on a damaged or oversized file: found by fuzzing six formats (TypeError: TIFF).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


def decode_image(source: ImageSource, *, name: str = "image") -> NDArray[np.uint8]:
    """Decodes an image to RGB as a viewer shows it: turned upright, transparency on white.

    Args:
        source: the bytes of an image file, the path of one, or a Pillow image. Gray, palette, CMYK
            and 16-bit gray images are converted; of an animation the first frame is taken.
        name: what an error message calls the image.

    Returns:
        [H, W, 3] uint8, a new array.

    Raises:
        ValueError: not an image, or a damaged one.

    Example:
        >>> decode_image(Image.new("L", (4, 2), color=7)).shape
        (2, 4, 3)
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _to_rgb(image)
    except FileNotFoundError:
        fail(name, "an image file", f"no file at {_describe(source)}", "correct the path")
    except _DECODE_ERRORS as error:
        fail(name, "an image that Pillow can read", f"{_describe(source)} ({error})", "replace it")


def count_pixels(source: ImageSource) -> int:
    """Pixels of an image by its file's header; 0 for one that `decode_image` refuses.

    Example:
        >>> count_pixels(Image.new("L", (4, 2)))
        8
    """
    try:
        if isinstance(source, Image.Image):
            return source.width * source.height
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.width * image.height
    except _DECODE_ERRORS:
        return 0


def _describe(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes that start with {source[:12]!r}"
    return source.as_posix() if isinstance(source, Path) else "a Pillow image"


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit gray: Pillow's own conversion would clip at 255 instead of scaling.
        gray = np.asarray(image).clip(0, 65535) / 257.0
        image = Image.fromarray(np.rint(gray).astype(np.uint8))
    elif image.mode == "F":
        fail("pixels", "integers", "32-bit floats of unknown range", "save it as 8-bit PNG")
    elif image.has_transparency_data:
        # Drawings on a transparent background are mostly black lines: on black they would vanish.
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))
