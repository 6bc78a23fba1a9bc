"""What each corruption does to images: DALI's operators, noise keyed by seeds, and some PyTorch.

`OPERATORS` maps a name to a function of n images [H, W, 3] uint8 on one device, n parameters
(already in pixels of their image) and n seeds, which returns n images of the same sizes. Images of
any sizes run together, and what comes out for one depends on its own pixels, parameter and seed.

DALI lacks three things, and they are made here. Noise that is independent of the batch:
`roma.views.noise`. An area average, for pixelate. Arithmetic over an image's colours that takes
more than a few calls: the extras whose docstrings say PyTorch. What PyTorch makes is the same on
every device: nothing is divided by a constant, which a GPU does by its reciprocal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma.views.dali import batch, dali, images_of, per_image
from roma.views.noise import add_impulses, add_noise, compiled, random_words
from roma.views.shapes import Kernel, disk, plasma, trail, window

Images = list[Tensor]
"""Of [H, W, 3] uint8, 0..255, contiguous."""
Operator = Callable[[Images, Sequence[Any], Sequence[int]], Images]
_SEPARABLE = 2.5  # px: from this sigma on, Σ window² is below 0.12
_AT_ONCE = 4  # fp32 images of a zoom blur in memory


def generator(seed: int) -> np.random.Generator:
    """Random numbers of an image, where a few are needed: a function of its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed))


# ------------------------------------------------------------------------------------------- noise


def gaussian_noise(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Adds sigma·n, n standard normal, drawn for each pixel and channel; rounds and clips."""
    rows = zip(images, sigmas, seeds, strict=True)
    return [add_noise(image, seed, 255 * sigma, proportional=False) for image, sigma, seed in rows]


def speckle(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Multiplies by 1 + sigma·n, n as in `gaussian_noise`; rounds and clips."""
    rows = zip(images, sigmas, seeds, strict=True)
    return [add_noise(image, seed, sigma, proportional=True) for image, sigma, seed in rows]


def salt_and_pepper(images: Images, shares: Sequence[float], seeds: Sequence[int]) -> Images:
    """A share of the pixels, drawn independently, becomes white or black with equal chance."""
    rows = zip(images, shares, seeds, strict=True)
    return [add_impulses(image, seed, share, whole_pixels=True) for image, share, seed in rows]


def impulse_noise(images: Images, shares: Sequence[float], seeds: Sequence[int]) -> Images:
    """Like `salt_and_pepper`, drawn for each pixel and channel."""
    rows = zip(images, shares, seeds, strict=True)
    return [add_impulses(image, seed, share, whole_pixels=False) for image, share, seed in rows]


def shot_noise(images: Images, parts: Sequence[float], seeds: Sequence[int]) -> Images:
    """Counts Poisson-distributed photons, 1/part of them where a value is white; PyTorch."""
    made = []
    for image, part, seed in zip(images, parts, seeds, strict=True):
        words = random_words(seed, image.numel(), image.device).view(image.shape)
        rows = image.to(torch.int64)
        thresholds = _poisson_thresholds(max(part, 1e-12)).to(image.device)
        found = torch.searchsorted(thresholds, (rows << 32) + words, right=True) - 255 * rows
        made.append(found.to(torch.uint8))
    return made


@lru_cache(maxsize=8)
def _poisson_thresholds(part: float) -> Tensor:
    """[256·255] int64, ascending: x·2³² + 2³²·P(result ≤ v | value x), for v in 0..254."""
    most = torch.floor((torch.arange(255, dtype=torch.float64) + 0.5) / (255 * part))
    mean = torch.arange(256, dtype=torch.float64)[:, None] / (255 * part)
    # P(count ≤ k) of mean m is Q(k + 1, m), the regularised upper incomplete gamma function.
    share = torch.special.gammaincc(most.add(1).expand(256, 255), mean.expand(256, 255))
    rows = torch.arange(256)[:, None] << 32
    return (rows + (share * 2**32).round().to(torch.int64)).reshape(-1)


# -------------------------------------------------------------------------------------------- blur


def gaussian_blur(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Gaussian blur over a window of radius ⌈3·sigma⌉; the border is reflected (dcb|abcd|cba).

    One of DALI's filters in two dimensions, or from a sigma of 2.5 px on two in one dimension with
    uint8 in between: rounding there moves values by 0.08 levels on average and by 1 at most.
    (DALI's own gaussian_blur takes six times as long; its filter with fp32 in between, three to
    four times.)
    """
    windows = [window(sigma) for sigma in sigmas]
    apart = [sigma >= _SEPARABLE for sigma in sigmas]
    first = [w[:, None] if own else np.outer(w, w) for w, own in zip(windows, apart, strict=True)]
    one = np.ones((1, 1), dtype=np.float32)
    second = [w[None] if own else one for w, own in zip(windows, apart, strict=True)]
    made = _filter(batch(images), first)
    return images_of(_filter(made, second) if any(apart) else made)


def motion_blur(
    images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]
) -> Images:
    """A trail along an angle uniform in ±45°: `trail` as a filter; the border is reflected."""
    angles = [math.radians(generator(seed).uniform(-45, 45)) for seed in seeds]
    trails = [trail(*own, angle) for own, angle in zip(parameters, angles, strict=True)]
    anchors = per_image([anchor for _, anchor in trails], np.int32)
    return images_of(_filter(batch(images), [kernel for kernel, _ in trails], anchor=anchors))


def defocus_blur(
    images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]
) -> Images:
    """The mean over a disk of a radius, its edge blurred by a sigma; the border is reflected."""
    return images_of(_filter(batch(images), [disk(*own) for own in parameters]))


def zoom_blur(
    images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]
) -> Images:
    """The mean of an image and of its centre enlarged by 1, 1 + step, … up to a largest zoom.

    DALI's resize and, for the sum, PyTorch.
    """
    made = []
    for image, (zoom, step) in zip(images, parameters, strict=True):
        size = np.array(image.shape[:2], dtype=np.float64)
        zooms = 1 + step * np.arange(math.floor((zoom - 1) / step + 1.5))
        total = image.float()
        for first in range(0, len(zooms), _AT_ONCE):
            half = size / 2 / zooms[first : first + _AT_ONCE, None]
            enlarged = dali().resize(
                batch([image] * len(half)),
                size=size.tolist(),
                roi_start=per_image(size / 2 - half, np.float32),
                roi_end=per_image(size / 2 + half, np.float32),
                antialias=False,
                dtype=dali().float32,
            )
            for one in images_of(enlarged):
                total += one
        made.append(_round(total * (1 / (len(zooms) + 1))))
    return made


def _filter(values: Any, kernels: Sequence[Kernel], **options: Any) -> Any:
    """Each image with its own kernel."""
    return dali().filter(values, _beside(values, list(kernels)), **options)


def _beside(values: Any, operands: Any) -> Any:
    """An operand for each image, where the images are."""
    made = dali().as_batch(operands)
    return made.gpu() if values.device.device_type == "gpu" else made


# -------------------------------------------------------------------------- compression, resolution


def jpeg(images: Images, qualities: Sequence[float], seeds: Sequence[int]) -> Images:
    """Encoded and decoded as JPEG (libjpeg's quality, rounded to an integer; 4:2:0 chroma)."""
    rounded = per_image(np.rint(qualities), np.int32)
    return images_of(dali().jpeg_compression_distortion(batch(images), quality=rounded))


def shrunk(length: int, factor: float) -> int:
    """The length of a side after shrinking: rounded, and one pixel at least."""
    return max(1, round(length * factor))


def downscale(images: Images, factors: Sequence[float], seeds: Sequence[int]) -> Images:
    """Bilinearly down (a triangle filter as wide as an output pixel, as PIL's) and back up."""
    full = [tuple(image.shape[:2]) for image in images]
    sizes = [(shrunk(h, own), shrunk(w, own)) for (h, w), own in zip(full, factors, strict=True)]
    small = dali().resize(batch(images), size=per_image(sizes, np.float32), subpixel_scale=False)
    return images_of(dali().resize(small, size=per_image(full, np.float32), subpixel_scale=False))


def pixelate(images: Images, factors: Sequence[float], seeds: Sequence[int]) -> Images:
    """Area average down, nearest up. PyTorch: DALI's resize has no box filter."""
    made = []
    for image, factor in zip(images, factors, strict=True):
        height, width = image.shape[:2]
        rows, columns = shrunk(height, factor), shrunk(width, factor)
        small = _round(_area_mean(_area_mean(image.float(), 0, rows), 1, columns))
        wide = small.index_select(1, _nearest(width, columns).to(image.device))
        made.append(wide.index_select(0, _nearest(height, rows).to(image.device)))
    return made


def _area_mean(x: Tensor, side: int, cells: int) -> Tensor:
    """Means over equal parts of one side of [H, W, 3]; a pixel that is cut counts in part."""
    # Summed pixel by pixel of a cell, which is one order on every device.
    places, shares = (own.to(x.device) for own in _overlaps(x.shape[side], cells))
    weights = shares.view(len(shares), *((cells, 1, 1) if side == 0 else (1, cells, 1)))
    mean = x.index_select(side, places[0]) * weights[0]
    for place, weight in zip(places[1:], weights[1:], strict=True):
        mean += x.index_select(side, place) * weight
    return mean


@lru_cache(maxsize=256)
def _overlaps(length: int, cells: int) -> tuple[Tensor, Tensor]:
    """[n, cells] int64 and fp32: pixels of each cell, at most n, and the share that each covers."""
    edges = np.arange(cells + 1) * (length / cells)
    first = np.minimum(np.floor(edges[:-1]), length - 1).astype(np.int64)
    most = int((np.ceil(edges[1:]) - first).max())
    pixels = first + np.arange(most)[:, None]
    covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    shares = (np.clip(covered, 0, None) * (cells / length)).astype(np.float32)
    return torch.from_numpy(np.minimum(pixels, length - 1)), torch.from_numpy(shares)


def _nearest(length: int, cells: int) -> Tensor:
    """[length] int64: the cell in which the centre of each pixel lies."""
    return (2 * torch.arange(length) + 1) * cells // (2 * length)


def posterize(images: Images, bits: Sequence[float], seeds: Sequence[int]) -> Images:
    """Keeps the topmost bits (their number rounded) of each value and clears the others."""
    masks = [256 - 2 ** (8 - round(own)) for own in bits]
    values = batch(images)
    return images_of(values & _beside(values, np.array(masks, dtype=np.uint8)))


# ----------------------------------------------------------------------------------------- masking

PATCH = 14
"""Side of a masked patch, px of the image itself: that of PAPO's policy, Qwen2.5-VL."""


def patch_mask(images: Images, chances: Sequence[float], seeds: Sequence[int]) -> Images:
    """Blackens patches of 14 × 14 px from the top left on, each with a chance; PyTorch.

    Patches at the right and lower edge are cut. A larger chance blackens the same and more.
    """
    made = []
    for image, chance, seed in zip(images, chances, seeds, strict=True):
        height, width = image.shape[:2]
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        words = random_words(seed, rows * columns, image.device).view(rows, columns)
        black = words < round(chance * 2**32)
        for side, length in enumerate((height, width)):
            places = torch.arange(length, device=image.device) // PATCH
            black = black.index_select(side, places)
        made.append(image.masked_fill(black[..., None], 0))
    return made


# ------------------------------------------------------------------------------- light and weather


def brightness(images: Images, shifts: Sequence[float], seeds: Sequence[int]) -> Images:
    """Adds a shift to the value of HSV, in 0..1, and clips it; hue and saturation stay; PyTorch."""
    made = []
    for image, shift in zip(images, shifts, strict=True):
        x = image.float()
        value = x.amax(2, keepdim=True)
        brighter = (value + 255 * shift).clamp(max=255)
        made.append(_round(torch.where(value > 0, x * (brighter / value.clamp(min=1)), brighter)))
    return made


def contrast(images: Images, factors: Sequence[float], seeds: Sequence[int]) -> Images:
    """Moves values towards their channel's mean over the image: mean + factor·(x - mean); PyTorch.

    The mean is taken of whole numbers, so its rounding depends on no order.
    """
    made = []
    for image, factor in zip(images, factors, strict=True):
        pixels = image.shape[0] * image.shape[1]
        total = image.sum((0, 1), dtype=torch.int64).double()
        mean = (total / total.new_tensor(pixels)).float()
        made.append(_round(mean + factor * (image.float() - mean)))
    return made


def saturate(
    images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]
) -> Images:
    """Multiplies the saturation of HSV, in 0..1, by a factor, adds a shift and clips; PyTorch.

    Gray has the hue of red, as in ImageNet-C.
    """
    made = []
    for image, (factor, shift) in zip(images, parameters, strict=True):
        x = image.float()
        value = x.amax(2, keepdim=True)
        away = (value - x) / value.clamp(min=1)  # the largest of the three is the saturation
        before = away.amax(2, keepdim=True)
        after = (before * factor + shift).clamp(0, 1)
        red = torch.tensor([0.0, 1.0, 1.0], device=x.device)
        share = torch.where(before > 0, away / before.clamp(min=1e-6), red)
        made.append(_round(value * (1 - share * after)))
    return made


def fog(images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]) -> Images:
    """Adds an amount of `plasma` of a decay; scales so that the largest value stays; PyTorch."""
    made = []
    for image, (amount, decay), seed in zip(images, parameters, seeds, strict=True):
        height, width = image.shape[:2]
        veil = plasma(max(height, width), decay, generator(seed))[:height, :width]
        most = image.max().float()
        whole = image.float() + 255 * amount * torch.from_numpy(veil).to(image.device)[..., None]
        made.append(_round(whole * (most / (most + 255 * amount))))
    return made


def _round(values: Tensor) -> Tensor:
    """Values of 0..255 as uint8."""
    return values.clamp(0, 255).round().to(torch.uint8)


OPERATORS: Mapping[str, Operator] = {
    operator.__name__: operator
    for operator in (
        *(gaussian_noise, gaussian_blur, jpeg, downscale),
        *(motion_blur, salt_and_pepper, speckle, posterize, pixelate),
        *(shot_noise, impulse_noise, defocus_blur, zoom_blur),
        *(brightness, contrast, saturate, fog, patch_mask),
    )
}
"""Corruption → operator."""

NOISES = frozenset(
    operator.__name__ for operator in (gaussian_noise, speckle, salt_and_pepper, impulse_noise)
)
"""Those of `roma.views.noise`."""

IN_PYTORCH = frozenset(
    operator.__name__
    for operator in (
        *(pixelate, shot_noise, zoom_blur),
        *(brightness, contrast, saturate, fog, patch_mask),
    )
)
"""Those that run on PyTorch's own threads."""


def runs_in_pytorch(name: str) -> bool:
    """Whether an operator runs on PyTorch's own threads here, where noise may not be compiled."""
    return name in IN_PYTORCH or (name in NOISES and not compiled())
