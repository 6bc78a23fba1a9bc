"""What the tests of views share: parameters in an image's own pixels, and bounds."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from support.views_reference import Pixels

from roma.views import CORRUPTIONS, degrade

# No scaling, so that a parameter means the same at every size.
UNSCALED = {name: replace(c, reference_size=None) for name, c in CORRUPTIONS.items()}

# "Rounded once" is half a level, and fp32 sums of weights that add up to 1 err by less than 1e-3 of
# a level at 255 (255·√n·2⁻²⁴ for n taps).
ROUNDED_ONCE = 0.5 + 1e-3

# Standard errors. Seeds are fixed, so a bound of 5 either holds or does not; for a right generator
# the chance that a new seed breaks one is 6e-7 a statistic.
LIMIT = 5.0


def view(image: Pixels, name: str, parameter: float | tuple[float, ...], seed: int = 0) -> Pixels:
    """One view, its parameter in pixels of this image."""
    return degrade(image, name, parameter=parameter, seed=seed, corruptions=UNSCALED)


def flat(value: int, height: int, width: int) -> Pixels:
    """An image of one value."""
    return np.full((height, width, 3), value, np.uint8)


def error(found: Pixels, expected: NDArray) -> float:
    """The largest difference, levels."""
    return float(np.abs(found - expected.astype(float)).max())


def correlation(first: NDArray, second: NDArray) -> float:
    """Of two arrays, place by place."""
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
