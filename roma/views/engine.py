"""The corruptions as DALI operators on the CPU (eager mode), batched, with stateless noise.

`OPERATORS` maps a name to a function of images [n, H, W, 3] uint8, n parameters (already in pixels
of these images) and n seeds, which returns images of the same shape. All images of a call run in
one DALI call with per-sample arguments.

Two things are not DALI's own, on purpose:

* Noise. DALI's noise operators draw from one generator per call, so independence from the batch
  would take a call per image (at 32 by 64 pixels 0.4 ms each, against 0.14 this way). The numbers
  come from Philox, a counter-based generator, keyed by the image's seed; DALI adds, multiplies,
  masks, rounds and clips.
* pixelate. DALI's resize has no box filter. The area average is a product with a matrix of
  overlaps on each side, the enlargement an index, both exact, in NumPy.

After the first image was degraded, DALI's threads run in this process. A worker process that is
then *forked* hangs in its first DALI call: start workers with the "spawn" method (PyTorch:
`DataLoader(..., multiprocessing_context="spawn")`). DALI_NUM_THREADS sets the number of threads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Images = NDArray[np.uint8]
"""[n, H, W, 3], 0..255."""
Kernel = NDArray[np.float32]
_LEAST = 1e-3  # px: a sigma whose nearest neighbour weighs exp(-5e5) = 0, and whose square is not 0
Operator = Callable[[Images, Sequence[Any], Sequence[int]], Images]


@lru_cache(maxsize=1)
def dali() -> Any:
    """DALI's eager mode, imported on first use (which takes some seconds).

    Raises:
        ImportError: DALI is not installed.
    """
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        remedy = "roma.views degrades images with NVIDIA DALI, which is not installed; "
        raise ImportError(remedy + "pip install 'roma[views]'", name=error.name) from error
    return ndd


def _batch(images: NDArray[Any]) -> Any:
    """Images as a DALI batch, without a copy."""
    return dali().as_batch(images, layout="HWC")


def _values(batch: Any) -> Images:
    """The pixels of a DALI batch of images of one size, in memory of their own."""
    values: Images = batch.evaluate().torch(copy=True).numpy()
    return values


def _per_sample(values: ArrayLike, dtype: type) -> Any:
    """A per-sample argument of a DALI operator."""
    return dali().as_batch(np.asarray(values, dtype=dtype))


def generator(seed: int) -> np.random.Generator:
    """The random numbers of an image: a function of its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed))


def _normals(shape: tuple[int, ...], scales: Sequence[float], seeds: Sequence[int]) -> Any:
    """[n, H, W, 3] fp32: normal numbers of each image's own generator, times its scale."""
    noise = np.empty(shape, dtype=np.float32)
    for own, scale, seed in zip(noise, scales, seeds, strict=True):
        generator(seed).standard_normal(out=own, dtype=np.float32)
        own *= scale
    return noise


def gaussian_noise(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Adds sigma·n, n standard normal, drawn for each pixel and channel; rounds and clips."""
    noise = _normals(images.shape, [255 * sigma for sigma in sigmas], seeds)
    return _values(dali().cast(_batch(images) + _batch(noise), dtype=dali().uint8))


def speckle(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Multiplies by 1 + sigma·n, n as in `gaussian_noise`; rounds and clips."""
    factors = _normals(images.shape, sigmas, seeds)
    factors += 1
    return _values(dali().cast(_batch(images) * _batch(factors), dtype=dali().uint8))


def salt_and_pepper(images: Images, shares: Sequence[float], seeds: Sequence[int]) -> Images:
    """A share of the pixels, drawn independently, becomes white or black with equal chance."""
    keep = np.empty((*images.shape[:3], 1), dtype=np.uint8)
    salt = np.empty_like(keep)
    for own_keep, own_salt, share, seed in zip(keep, salt, shares, seeds, strict=True):
        u = generator(seed).random(own_keep.shape, dtype=np.float32)
        own_keep[:] = np.where(u < share, 0, 255)
        own_salt[:] = np.where(u < share / 2, 255, 0)
    return _values((_batch(images) & _batch(keep)) | _batch(salt))


def gaussian_blur(images: Images, sigmas: Sequence[float], seeds: Sequence[int]) -> Images:
    """Gaussian blur over a window of radius ⌈3·sigma⌉; the border is reflected (dcb|abcd|cba)."""
    sigma = _per_sample(np.maximum(sigmas, _LEAST), np.float32)
    return _values(dali().gaussian_blur(_batch(images), sigma=sigma))


def motion_blur(
    images: Images, parameters: Sequence[tuple[float, float]], seeds: Sequence[int]
) -> Images:
    """A trail along an angle uniform in ±45°: `trail` as a filter; the border is reflected."""
    angles = [math.radians(generator(seed).uniform(-45, 45)) for seed in seeds]
    trails = [trail(*own, angle) for own, angle in zip(parameters, angles, strict=True)]
    kernels = dali().as_batch([kernel for kernel, _ in trails])
    anchors = _per_sample([anchor for _, anchor in trails], np.int32)
    return _values(dali().filter(_batch(images), kernels, anchor=anchors))


def trail(radius: float, sigma: float, angle: float) -> tuple[Kernel, tuple[int, int]]:
    """The kernel of a motion blur and where its origin lies in it.

    As ImageMagick's (which ImageNet-C uses): 2·radius + 1 taps, one pixel apart on a ray; tap i
    weighs exp(-i²/(2·sigma²)), i = 0, 1, …, so the trail lies on one side. Each tap is shared
    bilinearly by four pixels, where ImageMagick rounds.

    Args:
        radius: half the trail's length, px.
        sigma: its decay, px; 0 leaves the origin alone.
        angle: of the ray, radians, from the x axis towards the image's bottom.

    Returns:
        kernel [h, w] fp32, of sum 1, and (row, column) of its origin.
    """
    i = np.arange(math.ceil(2 * radius) + 1)
    i = i[i <= 5 * sigma + 1]  # what is left out weighs below 4e-6 of the whole
    weight = np.exp(-((i / max(sigma, _LEAST)) ** 2) / 2)
    y, x = i * math.sin(angle), i * math.cos(angle)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    origin = -top.min(), -left.min()
    kernel = np.zeros((np.ptp(top) + 2, np.ptp(left) + 2))
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - down - (y - top)) * np.abs(1 - right - (x - left))
        np.add.at(kernel, (top + origin[0] + down, left + origin[1] + right), weight * share)
    return (kernel / kernel.sum()).astype(np.float32), (int(origin[0]), int(origin[1]))


def jpeg(images: Images, qualities: Sequence[float], seeds: Sequence[int]) -> Images:
    """Encoded and decoded as JPEG (libjpeg's quality, rounded to an integer; 4:2:0 chroma)."""
    rounded = _per_sample(np.rint(qualities), np.int32)
    return _values(dali().jpeg_compression_distortion(_batch(images), quality=rounded))


def shrunk(length: int, factor: float) -> int:
    """The length of a side after shrinking: rounded, and one pixel at least."""
    return max(1, round(length * factor))


def downscale(images: Images, factors: Sequence[float], seeds: Sequence[int]) -> Images:
    """Bilinearly down (a triangle filter as wide as an output pixel, as PIL's) and back up."""
    height, width = images.shape[1:3]
    sizes = [(shrunk(height, factor), shrunk(width, factor)) for factor in factors]
    small = dali().resize(_batch(images), size=_per_sample(sizes, np.float32), subpixel_scale=False)
    return _values(dali().resize(small, size=[height, width], subpixel_scale=False))


def posterize(images: Images, bits: Sequence[float], seeds: Sequence[int]) -> Images:
    """Keeps the topmost bits (their number rounded) of each value and clears the others."""
    masks = [256 - 2 ** (8 - round(own)) for own in bits]
    return _values(_batch(images) & _per_sample(masks, np.uint8))


def pixelate(images: Images, factors: Sequence[float], seeds: Sequence[int]) -> Images:
    """Area average down, nearest up. Not DALI: see the module's docstring."""
    height, width = images.shape[1:3]
    out = np.empty_like(images)
    for image, pixelated, factor in zip(images, out, factors, strict=True):
        rows, columns = shrunk(height, factor), shrunk(width, factor)
        tall = _overlaps(height, rows) @ image.reshape(height, -1).astype(np.float32)
        small = _overlaps(width, columns) @ tall.reshape(rows, width, 3)
        pixelated[:] = np.rint(small)[_nearest(height, rows)][:, _nearest(width, columns)]
    return out


@lru_cache(maxsize=256)
def _overlaps(length: int, cells: int) -> NDArray[np.float32]:
    """[cells, length] fp32: the share of each cell that each pixel covers; rows add up to 1."""
    edges = np.arange(cells + 1) * (length / cells)
    pixels = np.arange(length)
    low = np.maximum(edges[:-1, None], pixels)
    high = np.minimum(edges[1:, None], pixels + 1)
    return (np.clip(high - low, 0, None) * (cells / length)).astype(np.float32)


def _nearest(length: int, cells: int) -> NDArray[np.int64]:
    """[length] int64: the cell in which the centre of each pixel lies."""
    return (2 * np.arange(length) + 1) * cells // (2 * length)


OPERATORS: Mapping[str, Operator] = {
    operator.__name__: operator
    for operator in (
        *(gaussian_noise, gaussian_blur, jpeg, downscale),
        *(motion_blur, salt_and_pepper, speckle, posterize, pixelate),
    )
}
"""Corruption → operator."""
