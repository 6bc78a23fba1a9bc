"""A contact sheet: every corruption of an image at every level, with its parameter."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from roma.models.images import decode_image
from roma.views.batch import degrade_batch
from roma.views.corruptions import ADVERSARIAL, CORRUPTIONS, NEEDS_POLICY, Corruption
from roma.views.sample import ViewSpec, seed_for
from roma_kernels.errors import fail

_TILE, _GAP, _LINE = 192, 8, 18  # px: shorter side a tile is enlarged to, margins, a line of text
_SCREEN = 256  # px: the longest shorter side of a tile


def draw_gallery(
    image: NDArray[np.uint8],
    *,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    window: int | None = None,
    seed: int = 0,
) -> Image.Image:
    """A row per corruption, a column per level; column 0 is the clean image.

    The image is degraded at its own size. For the sheet, small tiles are then enlarged by a whole
    factor without smoothing, and large ones reduced.

    Args:
        image: [H, W, 3] uint8, RGB.
        corruptions: the table of levels; one that needs a policy has no row.
        window: show this many pixels of height and width in the image's middle, as they are; None:
            the whole image.
        seed: of the noise.

    Raises:
        ValueError: the table is empty, a window below 1, or as in `degrade`.
        TypeError: as in `degrade`.
        ImportError: DALI is not installed.

    Example:
        >>> draw_gallery(np.zeros((32, 64, 3), np.uint8)).mode
        'RGB'
    """
    given = corruptions
    corruptions = {name: row for name, row in given.items() if row.pool != ADVERSARIAL}
    if not corruptions:
        expected = "at least one corruption that an image alone is enough for"
        remedy = NEEDS_POLICY if given else "leave it out for CORRUPTIONS"
        fail("corruptions", expected, ", ".join(given) or "none", remedy)
    shown = _middle(image.shape[1], image.shape[0], window)
    width, height = _tile_size(
        *(high - low for low, high in zip(shown[:2], shown[2:], strict=True))
    )
    across = 1 + max(len(corruption.levels) for corruption in corruptions.values())
    row = height + 2 * _LINE + _GAP
    size = (_GAP + across * (width + _GAP), _GAP + len(corruptions) * row)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, corruption in enumerate(corruptions.values()):
        top = _GAP + i * row
        title = f"{corruption.name} ({corruption.pool}): {corruption.full_unit}"
        pen.text((_GAP, top), title, fill="black", font=font)
        specs = [
            ViewSpec(corruption.name, corruption.parameter(level), float(level))
            for level in range(len(corruption.levels) + 1)
        ]
        seeds = [seed_for(seed, spec.corruption, str(spec.level)) for spec in specs]
        views = degrade_batch([image] * len(specs), specs, seeds, corruptions=corruptions)
        for level in range(len(corruption.levels) + 1):
            left = _GAP + level * (width + _GAP)
            tile = Image.fromarray(views[level]).crop(shown)
            shrink = width < tile.width
            method = Image.Resampling.BOX if shrink else Image.Resampling.NEAREST
            frame = left - 1, top + _LINE - 1, left + width, top + _LINE + height
            pen.rectangle(frame, outline="lightgray")
            sheet.paste(tile.resize((width, height), method), (left, top + _LINE))
            caption = f"L{level}: {corruption.describe(corruption.parameter(level))}"
            below = top + _LINE + height
            pen.text((left, below), caption if level else "clean", fill="dimgray", font=font)
    return sheet


def write_gallery(
    image_path: str | Path,
    out: str | Path,
    *,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    window: int | None = None,
    seed: int = 0,
) -> Path:
    """`roma views`: draws the gallery of an image file to a PNG file, and returns its path.

    Raises:
        ValueError: there is no such file, it is not an image or a damaged one, or `out` is not
            called .png or is the image itself.
        OSError: the gallery cannot be written.
        ImportError: DALI is not installed.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        fail("out", "a name that ends in .png", str(out), f"call it {out.stem}.png")
    if out.exists() and Path(image_path).exists() and out.samefile(image_path):
        fail("out", "another file than the image", str(out), "choose another name")
    image = decode_image(Path(image_path), name="IMAGE")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_gallery(image, corruptions=corruptions, window=window, seed=seed).save(out, optimize=True)
    return out


def _middle(width: int, height: int, window: int | None) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is shown."""
    if window is None:
        return 0, 0, width, height
    if window < 1:
        fail("window", "at least one pixel", str(window), "leave it out for the whole image")
    wide, high = min(window, width), min(window, height)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a tile: the image's, times a whole factor, or reduced to fit."""
    shorter = min(width, height)
    if shorter > _SCREEN:
        return max(1, width * _SCREEN // shorter), max(1, height * _SCREEN // shorter)
    factor = max(1, _TILE // max(width, height))
    return factor * width, factor * height
