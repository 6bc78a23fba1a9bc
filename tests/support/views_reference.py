"""The corruptions that draw no noise, written again without DALI, and the moments of those that do.

Pillow, SciPy and float64 NumPy; no line is shared with roma.views.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

Pixels = NDArray[np.uint8]


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """[height, width, 3] uint8: independent uniform pixels, the hardest image to filter rightly."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Pixels:
    """[height, width, 3] uint8: waves of several lengths, as in a photograph."""
    y, x = np.indices((height, width))
    waves = [np.sin(x / a + channel) * np.cos(y / b) for channel in range(3) for a, b in [(4, 7)]]
    fine = [0.3 * np.sin(x * 1.3 + y * channel) for channel in range(3)]
    values = np.stack(waves, axis=2) + np.stack(fine, axis=2)
    return np.rint(127.5 + 95 * values).clip(0, 255).astype(np.uint8)


def jpeg(image: Pixels, quality: int) -> Pixels:
    """Through Pillow's encoder (4:2:0) and decoder."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def posterize(image: Pixels, bits: int) -> Pixels:
    """Pillow's."""
    return np.asarray(ImageOps.posterize(Image.fromarray(image), bits))


def gaussian_blur(image: Pixels, sigma: float) -> NDArray[np.float64]:
    """Separable, window of radius ⌈3·sigma⌉, border dcb|abcd|cba (SciPy calls it mirror)."""
    t = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    window = np.exp(-(t**2) / (2 * sigma**2))
    window /= window.sum()
    down = ndimage.correlate1d(image.astype(float), window, axis=0, mode="mirror")
    return ndimage.correlate1d(down, window, axis=1, mode="mirror")


def motion_blur(image: Pixels, radius: float, sigma: float, degrees: float) -> NDArray[np.float64]:
    """Weighted mean of the image read at 2·radius + 1 points along a ray, bilinearly."""
    rows, columns = np.indices(image.shape[:2])
    total, out = 0.0, np.zeros(image.shape)
    for i in range(math.ceil(2 * radius) + 1):
        weight = math.exp(-(i**2) / (2 * sigma**2))
        y = rows + i * math.sin(math.radians(degrees))
        x = columns + i * math.cos(math.radians(degrees))
        for channel in range(3):
            plane = image[..., channel].astype(float)
            out[..., channel] += weight * ndimage.map_coordinates(
                plane, [y, x], order=1, mode="mirror"
            )
        total += weight
    return out / total


def _small(length: int, factor: float) -> int:
    """The length of a side after shrinking."""
    return max(1, round(length * factor))


def _triangle(length: int, wanted: int) -> NDArray[np.float64]:
    """[wanted, length]: bilinear weights, as wide as the coarser grid's pixel; edges repeat."""
    scale = length / wanted
    reach = max(scale, 1.0)
    weights = np.zeros((wanted, length))
    for row in range(wanted):
        centre = (row + 0.5) * scale - 0.5
        for pixel in range(math.floor(centre - reach), math.ceil(centre + reach) + 1):
            weight = max(0.0, 1 - abs(pixel - centre) / reach)
            weights[row, min(max(pixel, 0), length - 1)] += weight
    return weights / weights.sum(axis=1, keepdims=True)


def downscale(image: Pixels, factor: float, *, whole: bool = False) -> NDArray[np.float64]:
    """A triangle filter down, the same up; in between whole levels, or nothing rounded."""
    planes = np.moveaxis(image.astype(float), 2, 0)
    down, up = [], []
    for length in image.shape[:2]:
        small = _small(length, factor)
        down.append(_triangle(length, small))
        up.append(_triangle(small, length))
    small_image = down[0] @ planes @ down[1].T
    small_image = np.rint(small_image) if whole else small_image
    return np.moveaxis(up[0] @ small_image @ up[1].T, 0, 2)


def downscale_pillow(image: Pixels, factor: float) -> Pixels:
    """Pillow's bilinear filter, which at the border drops what lies outside."""
    size = [_small(length, factor) for length in image.shape[1::-1]]
    small = Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BILINEAR)
    return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BILINEAR))


def pixelate(image: Pixels, factor: float) -> NDArray[np.float64]:
    """Exact area average: each pixel is cut into as many parts as there are cells. Then nearest."""
    found = image.astype(float)
    for axis, length in enumerate(image.shape[:2]):
        cells = _small(length, factor)
        parts = np.moveaxis(np.repeat(found, cells, axis=axis), axis, 0)
        means = parts.reshape(cells, length, *parts.shape[1:]).mean(axis=1)
        cell = [math.floor((pixel + 0.5) * cells / length) for pixel in range(length)]
        found = np.moveaxis(means[cell], 0, axis)
    return found


def misfit(noise: NDArray[np.float64], variance: float) -> float:
    """How far draws are from independent normal ones of mean 0, in standard errors.

    The largest of five statistics of n values, each with expectation 0 and standard error 1 (to
    order 1/n): mean, variance (a normal's has relative standard error √(2/n)), kurtosis (√(24/n)),
    correlation of horizontal neighbours and of colour channels (1/√n).
    """
    n = noise.size
    unit = noise / math.sqrt(variance)
    found = (
        unit.mean() * math.sqrt(n),
        ((unit**2).mean() - 1) * math.sqrt(n / 2),
        ((unit**4).mean() / (unit**2).mean() ** 2 - 3) * math.sqrt(n / 24),
        (unit[:, 1:] * unit[:, :-1]).mean() * math.sqrt(unit[:, 1:].size),
        (unit[..., 1:] * unit[..., :-1]).mean() * math.sqrt(unit[..., 1:].size),
    )
    return max(map(abs, found))
