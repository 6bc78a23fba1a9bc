"""The extra corruptions: levels against imagecorruptions, pixels against float64 references."""

import colorsys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from support import imagenet_c
from support.views_checks import ROUNDED_ONCE, UNSCALED, error, flat, view
from support.views_reference import Pixels, picture, smooth

from roma.views import CORRUPTIONS, degrade

Floats = NDArray[np.float64]
EXTRA = [name for name, c in CORRUPTIONS.items() if c.pool == "extra"]
SIZES = ((1, 1), (1, 5), (7, 1), (17, 31))


# Levels


SAME = {
    "gaussian_noise": "gaussian_noise",
    "speckle": "speckle_noise",
    "gaussian_blur": "gaussian_blur",
    "jpeg": "jpeg_compression",
    "motion_blur": "motion_blur",
    "pixelate": "pixelate",
    "salt_and_pepper": "impulse_noise",
    "impulse_noise": "impulse_noise",
    "defocus_blur": "defocus_blur",
    "fog": "fog",
    "brightness": "brightness",
    "contrast": "contrast",
}


@pytest.mark.parametrize("name", SAME)
def test_levels_are_imagenet_cs(name: str) -> None:
    assert list(CORRUPTIONS[name].levels) == imagenet_c.levels(SAME[name])


def test_levels_in_another_form_are_imagenet_cs() -> None:
    photons = [1 / level for level in CORRUPTIONS["shot_noise"].levels]
    assert photons == pytest.approx(imagenet_c.levels("shot_noise"), rel=1e-12)
    # theirs takes colour away at levels 1 and 2 and adds it from level 3 on
    assert list(CORRUPTIONS["saturate"].levels[2:]) == imagenet_c.levels("saturate")[2:]


def zooms(zoom: float, step: float) -> Floats:
    return 1 + step * np.arange(round((zoom - 1) / step) + 1)


@pytest.mark.parametrize("level", range(5))
def test_zooms_are_imagenet_cs(level: int) -> None:
    found = zooms(*CORRUPTIONS["zoom_blur"].levels[level])
    assert found.tolist() == pytest.approx(imagenet_c.levels("zoom_blur")[level].tolist(), abs=1e-9)


# Without noise


def colours() -> Pixels:
    """16³ colours from corner to corner of the cube, and a row of grays."""
    axis = np.arange(0, 256, 17)
    cube = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(64, 64, 3)
    grays = np.repeat(np.arange(0, 256, 4)[None, :, None], 3, axis=2)
    return np.concatenate([cube, grays]).astype(np.uint8)


def through_hsv(image: Pixels, change: Callable[[float, float], tuple[float, float]]) -> Floats:
    """Saturation and value changed, pixel by pixel."""
    out = []
    for pixel in image.reshape(-1, 3).tolist():
        h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        out.append(colorsys.hsv_to_rgb(h, *change(s, v)))
    return 255 * np.array(out).reshape(image.shape)


def brightness(image: Pixels, shift: float) -> Floats:
    return through_hsv(image, lambda s, v: (s, min(v + shift, 1)))


def saturate(image: Pixels, factor: float, shift: float) -> Floats:
    return through_hsv(image, lambda s, v: (min(max(s * factor + shift, 0), 1), v))


def contrast(image: Pixels, factor: float) -> Floats:
    mean = image.mean(axis=(0, 1), dtype=float)
    return (mean + factor * (image - mean)).clip(0, 255)


def defocus_blur(image: Pixels, radius: float, sigma: float) -> Floats:
    """A disk whose edge a Gaussian of 3×3 taps softens, 5×5 for a large one."""
    y, x = np.indices((2 * int(radius) + 1,) * 2) - int(radius)
    disk = (x**2 + y**2 <= radius**2).astype(float)
    t = np.arange(-2, 3) if radius > 8 else np.arange(-1, 2)
    window = np.exp(-(t**2) / (2 * sigma**2))
    window /= window.sum()
    kernel = np.pad(disk / disk.sum(), t.max())
    for axis in (0, 1):
        kernel = ndimage.convolve1d(kernel, window, axis=axis, mode="constant")
    planes = [
        ndimage.correlate(image[..., channel].astype(float), kernel, mode="mirror")
        for channel in range(3)
    ]
    return np.stack(planes, axis=2)


def zoomed(image: Pixels, zoom: float) -> Floats:
    """The part around the centre, bilinearly, as large as the image; edges repeat."""
    y, x = (n / 2 + (np.arange(n) + 0.5 - n / 2) / zoom - 0.5 for n in image.shape[:2])
    grid = np.meshgrid(y, x, indexing="ij")
    planes = [
        ndimage.map_coordinates(image[..., channel].astype(float), grid, order=1, mode="nearest")
        for channel in range(3)
    ]
    return np.stack(planes, axis=2)


def zoom_blur(image: Pixels, zoom: float, step: float) -> Floats:
    layers = [zoomed(image, each) for each in zooms(zoom, step)]
    return (image + sum(layers)) / (len(layers) + 1)


@pytest.mark.parametrize("level", range(5))
def test_hsv_corruptions_equal_the_standard_librarys(level: int) -> None:
    for image in (colours(), picture(17, 31), smooth(7, 1), picture(1, 5), picture(1, 1)):
        shift = CORRUPTIONS["brightness"].levels[level]
        found = view(image, "brightness", shift)
        assert error(found, brightness(image, shift)) <= ROUNDED_ONCE
        factor, shift = CORRUPTIONS["saturate"].levels[level]
        found = view(image, "saturate", (factor, shift))
        assert error(found, saturate(image, factor, shift)) <= ROUNDED_ONCE


def test_saturation_at_its_ends_equals_the_standard_librarys() -> None:
    """A factor or a shift alone, up to full colour."""
    for factor, shift in ((1.0, 0.3), (1.0, 1.0), (1.01, 0.0), (1e6, 0.0)):
        found = view(colours(), "saturate", (factor, shift))
        assert error(found, saturate(colours(), factor, shift)) <= ROUNDED_ONCE


def test_saturation_turns_gray_red() -> None:
    """A gray has hue 0, so that a shift of its saturation is one towards red."""
    found = view(flat(100, 2, 3), "saturate", (5.0, 0.1))
    np.testing.assert_array_equal(found, np.broadcast_to([100, 90, 90], (2, 3, 3)))


@pytest.mark.parametrize("level", range(5))
def test_contrast_equals_its_definition(level: int) -> None:
    factor = CORRUPTIONS["contrast"].levels[level]
    # the largest sums to more than fp32's 2²⁴ whole numbers
    for image in (picture(601, 799), colours(), *(picture(*size) for size in SIZES)):
        assert error(view(image, "contrast", factor), contrast(image, factor)) <= ROUNDED_ONCE


@pytest.mark.parametrize("level", range(5))
def test_defocus_blur_equals_its_definition(level: int) -> None:
    """Images smaller than the disk too, whose mirror images repeat."""
    radius, sigma = CORRUPTIONS["defocus_blur"].levels[level]
    for size in (*SIZES, (45, 34)):
        image = picture(*size)
        found = view(image, "defocus_blur", (radius, sigma))
        assert error(found, defocus_blur(image, radius, sigma)) <= ROUNDED_ONCE


def test_defocus_blur_between_levels() -> None:
    """A radius of less than a pixel leaves one tap; the window grows beyond radius 8."""
    image = picture(45, 34)
    for radius, sigma in ((0.9, 0.5), (1.0, 0.2), (2.3, 0.4), (8.0, 1.0), (8.1, 1.0), (9.9, 0.5)):
        found = view(image, "defocus_blur", (radius, sigma))
        assert error(found, defocus_blur(image, radius, sigma)) <= ROUNDED_ONCE


def test_defocus_blur_scales_by_the_shorter_side() -> None:
    """Radius and edge of 224 pixels are a quarter at 56 by 80."""
    image = picture(56, 80)
    scaled = degrade(image, "defocus_blur", parameter=(12.0, 2.0), seed=0)
    np.testing.assert_array_equal(scaled, view(image, "defocus_blur", (3.0, 0.5)))


ZOOMS = (*CORRUPTIONS["zoom_blur"].levels, (1.11, 0.01), (2.0, 0.25), (3.0, 1.0))


@pytest.mark.parametrize("parameter", ZOOMS)
def test_zoom_blur_equals_its_definition(parameter: tuple[float, float]) -> None:
    """Weights are not quantised, so that only fp32 coordinates come on top of rounding.

    A coordinate up to n is known to n·2⁻²⁴ pixels, and a pixel is 255 levels at most, on two axes.
    """
    sizes = (*SIZES, (45, 34), (224, 301))
    for image in (smooth(70, 91), *(picture(*size) for size in sizes)):
        expected = zoom_blur(image, *parameter)
        found = view(image, "zoom_blur", parameter)
        assert error(found, expected) <= ROUNDED_ONCE + 2 * 255 * max(image.shape) * 2**-24
        # a value rounds the other way only near a half: many have one at zooms of 2 and 3
        assert np.abs(found - np.rint(expected)).mean() < 0.1


def test_bounds_without_noise_bite() -> None:
    """A tenth of each parameter more, a missing zoom and a wrong border are all seen."""
    image = picture(45, 34)
    assert error(view(image, "brightness", 0.1), brightness(image, 0.11)) > 2
    assert error(view(image, "saturate", (2.0, 0.0)), saturate(image, 2.2, 0)) > 2
    assert error(view(image, "contrast", 0.4), contrast(image, 0.44)) > 2
    assert error(view(image, "contrast", 0.4), contrast(image - image % 16, 0.4)) > 2
    assert error(view(image, "defocus_blur", (6.0, 0.5)), defocus_blur(image, 5, 0.5)) > 2
    assert (
        error(view(image, "defocus_blur", (3.0, 0.5)), defocus_blur(image, 3, 0.55)) > ROUNDED_ONCE
    )
    assert error(view(image, "zoom_blur", (1.2, 0.02)), zoom_blur(image, 1.18, 0.02)) > 2
    turned = zoom_blur(image[::-1], 1.2, 0.02)[::-1]
    np.testing.assert_allclose(turned, zoom_blur(image, 1.2, 0.02))
    assert error(view(image, "zoom_blur", (1.2, 0.02)), np.roll(turned, 1, axis=1)) > 2


# All of them


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EXTRA)
def test_small_and_odd_images(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    for table in (CORRUPTIONS, UNSCALED):
        for parameter in CORRUPTIONS[name].levels:
            found = degrade(image, name, parameter=parameter, seed=1, corruptions=table)
            assert found.shape == image.shape and found.dtype == np.uint8
    found = degrade(image, name, parameter=CORRUPTIONS[name].identity, seed=1)
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize(
    "name, parameter",
    (
        ("brightness", 1e-3),
        ("contrast", 0.999),
        ("saturate", (1.001, 0.0)),
        ("saturate", (1.0, 0.001)),
        ("fog", (1e-3, 2.0)),
        ("shot_noise", 1e-9),
    ),
)
def test_near_identity_hardly_anything_changes(name: str, parameter: float | tuple) -> None:
    """Each moves a value by less than 255·1.1e-3 = 0.3 levels before rounding, so none after.

    Shot noise of 1e-9 has a standard deviation of 255·√1e-9 = 0.008 levels at most.
    """
    np.testing.assert_array_equal(view(picture(17, 31), name, parameter), picture(17, 31))
