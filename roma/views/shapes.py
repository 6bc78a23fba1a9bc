"""The shapes that blurs and fog are made of: windows, trails, disks and clouds, in NumPy."""

import math

import numpy as np
from numpy.typing import NDArray

Kernel = NDArray[np.float32]
_LEAST = 1e-3  # px: a sigma whose nearest neighbour weighs exp(-5e5) = 0, and whose square is not 0


def window(sigma: float) -> Kernel:
    """A Gaussian: [2·⌈3·sigma⌉ + 1] fp32, of sum 1."""
    sigma = max(sigma, _LEAST)
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weight = np.exp(-((reach / sigma) ** 2) / 2)
    return (weight / weight.sum()).astype(np.float32)


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


def disk(radius: float, sigma: float) -> Kernel:
    """[n, n] fp32, of sum 1: pixels whose centre lies in a disk, blurred by a Gaussian of sigma.

    As in ImageNet-C the Gaussian has 3 × 3 taps, 5 × 5 from a radius above 8 on.
    """
    reach = math.floor(radius) + (1 if radius <= 8 else 2)
    away = np.arange(-reach, reach + 1)
    inside = (away[:, None] ** 2 + away**2 <= radius**2).astype(float)
    blur = np.exp(-((away / max(sigma, _LEAST)) ** 2) / 2) * (
        abs(away) <= reach - math.floor(radius)
    )
    spread = np.stack([np.convolve(row, blur, mode="same") for row in inside])
    spread = np.stack([np.convolve(row, blur, mode="same") for row in spread.T])
    return (spread / spread.sum()).astype(np.float32)


def plasma(size: int, decay: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A cloud of 0..1, [n, n] with n the power of two from `size` on, periodic.

    Midpoint displacement on squares and diamonds by turns (Fournier et al., 1982): a new point is
    the mean of its four neighbours plus a uniform number, whose range a turn divides by decay², as
    in ImageNet-C.
    """
    n = 1 << max(size - 1, 1).bit_length()
    cloud, step, reach = np.zeros((n, n)), n, 1.0
    while step > 1:
        half = step // 2

        def displaced(total: NDArray[np.float64], reach: float = reach) -> NDArray[np.float64]:
            return total / 4 + rng.uniform(-reach, reach, total.shape)

        corners = cloud[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        cloud[half::step, half::step] = displaced(pairs + np.roll(pairs, -1, axis=1))
        middles = cloud[half::step, half::step]
        beside = middles + np.roll(middles, 1, axis=0), corners + np.roll(corners, -1, axis=1)
        cloud[::step, half::step] = displaced(beside[0] + beside[1])
        beside = middles + np.roll(middles, 1, axis=1), corners + np.roll(corners, -1, axis=0)
        cloud[half::step, ::step] = displaced(beside[0] + beside[1])
        step, reach = half, reach / decay**2
    cloud -= cloud.min()
    return (cloud / cloud.max()).astype(np.float32)
