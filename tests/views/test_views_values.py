"""The nine corruptions against references without DALI: pixels, and distributions of the noises."""

import math

import numpy as np
import pytest
from support import views_reference as reference
from support.views_checks import LIMIT, ROUNDED_ONCE, UNSCALED, error, flat, view
from support.views_reference import picture, smooth

from roma.views import ViewSpec, degrade, degrade_batch, operators

# One pixel, a line, sides that no block, chroma or shrinking factor divides, and the demo's size.
SIZES = ((1, 1), (1, 5), (7, 1), (2, 3), (3, 70), (17, 31), (32, 64), (70, 90))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", (1, 15, 60, 99))
def test_jpeg_is_pillows_bit_for_bit(size: tuple[int, int], quality: int) -> None:
    """Odd sizes too, where chroma blocks stick out."""
    image = picture(*size)
    found = degrade(image, "jpeg", parameter=float(quality), seed=0)
    np.testing.assert_array_equal(found, reference.jpeg(image, quality))


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_is_pillows_bit_for_bit(bits: int) -> None:
    """Over all 256 values."""
    image = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    found = degrade(image, "posterize", parameter=float(bits), seed=0)
    np.testing.assert_array_equal(found, reference.posterize(image, bits))


@pytest.mark.parametrize("size", SIZES)
def test_filters_equal_their_definitions(size: tuple[int, int]) -> None:
    """The whole image, border included."""
    image = picture(*size)

    degrees = operators.generator(5).uniform(-45, 45)
    for sigma in (0.3, 1.0, 2.4, 3.7):
        expected = reference.gaussian_blur(image, sigma)
        roundings = 1 if sigma < operators._SEPARABLE else 2
        assert error(view(image, "gaussian_blur", sigma), expected) <= roundings * ROUNDED_ONCE
        expected = reference.motion_blur(image, 2.5 * sigma, sigma, degrees)
        assert (
            error(view(image, "motion_blur", (2.5 * sigma, sigma), seed=5), expected)
            <= ROUNDED_ONCE
        )
    for factor in (0.01, 0.15, 0.33, 0.8):
        assert (
            error(view(image, "pixelate", factor), reference.pixelate(image, factor))
            <= ROUNDED_ONCE
        )
        # the small image is rounded too, and the way up averages it
        expected = reference.downscale(image, factor)
        assert error(view(image, "downscale", factor), expected) <= 2 * ROUNDED_ONCE


@pytest.mark.parametrize("factor", (0.15, 0.33, 0.5, 0.8))
def test_downscale_rounds_hardly_anything_otherwise(factor: float) -> None:
    """Against a small image of whole levels: only what lies near a half may be rounded otherwise.

    fp32 sums are known to 1e-3 of a level, so in the small image and in the result each a value in
    500 may be; one of the small image moves the 1/factor² values around it.
    """
    for image in (smooth(96, 128), picture(96, 128)):
        found = view(image, "downscale", factor)
        away = np.abs(found - np.rint(reference.downscale(image, factor, whole=True)))
        assert away.max() <= 1 and away.mean() <= 2 * 2e-3
        other = np.rint(reference.downscale(image, factor, whole=False))
        assert np.abs(found - other).mean() > 0.1  # which is what nothing rounded would give


@pytest.mark.parametrize("sigma", (2.5, 4.0, 9.0))
def test_two_roundings_of_a_wide_blur_move_little(sigma: float) -> None:
    """Values between passes are off by 0.29 (rms) each, and the second pass averages them: 0.8·0.29
    ·√Σw² levels are moved in the mean, which is 0.08 at sigma 2.5 and less above."""
    image = smooth(96, 128)
    found = view(image, "gaussian_blur", sigma)
    away = np.abs(found - np.rint(reference.gaussian_blur(image, sigma)))
    assert away.max() <= 1 and away.mean() <= 0.1
    wrong = np.rint(reference.gaussian_blur(image, 1.02 * sigma))
    assert np.abs(found - wrong).mean() > 0.1


@pytest.mark.parametrize("factor", (0.5, 0.25))
def test_downscale_is_pillows_inside(factor: float) -> None:
    """Where the filter reaches over the border, DALI repeats the edge and Pillow renormalises."""
    image, rim = picture(64, 96), math.ceil(2 / factor)
    found = degrade(image, "downscale", parameter=factor, seed=0).astype(float)
    gap = np.abs(found - reference.downscale_pillow(image, factor))[rim:-rim, rim:-rim]
    assert gap.max() <= 3  # Pillow rounds after each of its four passes, DALI after two


def test_bounds_of_the_filters_bite() -> None:
    """A pixel's shift, a tenth of a pixel of sigma and a cell more are all seen."""
    image = picture(32, 64)

    blurred = reference.gaussian_blur(image, 1.0)
    assert error(view(image, "gaussian_blur", 1.1), blurred) > 5
    assert error(view(image, "gaussian_blur", 1.0), np.roll(blurred, 1, axis=1)) > 5
    assert error(view(image, "downscale", 0.5), reference.downscale(image, 0.53)) > 5
    assert error(view(image, "pixelate", 0.5), reference.pixelate(image, 0.53)) > 5


# Noise, by distribution.


def test_gaussian_noise_has_its_distribution() -> None:
    """Mid gray, so that nothing clips (5 sigma = 127); rounding adds a variance of 1/12."""
    gray = flat(128, 128, 128)
    noise = degrade(gray, "gaussian_noise", parameter=0.1, seed=1).astype(float) - 128
    variance = 25.5**2 + 1 / 12
    assert reference.misfit(noise, variance) < LIMIT
    # n = 49152: the variance is known to 0.6 %, so planted errors are far out
    assert reference.misfit(1.1 * noise, variance) > LIMIT
    assert reference.misfit(np.repeat(noise[:, ::2], 2, axis=1), variance) > LIMIT
    assert reference.misfit(np.repeat(noise[..., :1], 3, axis=2), variance) > LIMIT
    uniform = np.random.default_rng(0).uniform(-1, 1, gray.shape) * math.sqrt(3 * variance)
    assert reference.misfit(uniform, variance) > LIMIT


def test_speckle_has_its_distribution() -> None:
    """Its noise is proportional to the pixel: black stays black."""
    for value in (0, 40, 120):
        plain = flat(value, 128, 128)
        noise = degrade(plain, "speckle", parameter=0.2, seed=2).astype(float) - value
        if value:
            assert reference.misfit(noise, (0.2 * value) ** 2 + 1 / 12) < LIMIT
        else:
            assert not noise.any()


@pytest.mark.parametrize("name", ("gaussian_noise", "speckle"))
def test_noise_clips(name: str) -> None:
    """Half of the draws on white stay white; none wraps around to black."""
    white = flat(255, 128, 128)
    found = degrade(white, name, parameter=0.1, seed=3)
    n = found.size
    # a draw above -0.5 rounds to 255: chance 0.5 + 0.5/(25.5·√(2π))
    chance = 0.5 + 0.5 / (25.5 * math.sqrt(2 * math.pi))
    bound = LIMIT * math.sqrt(n * chance * (1 - chance))
    assert abs((found == 255).sum() - n * chance) < bound
    assert found.min() > 255 - 6 * 25.5


@pytest.mark.parametrize("share", (0.03, 0.3, 1.0))
def test_salt_and_pepper_hits_its_share(share: float) -> None:
    """Whole pixels, salt and pepper alike, at independent places."""
    gray = flat(100, 128, 192)
    found = degrade(gray, "salt_and_pepper", parameter=share, seed=4)
    assert (found == found[..., :1]).all()
    salt, pepper = found[..., 0] == 255, found[..., 0] == 0
    assert (salt | pepper | (found[..., 0] == 100)).all()
    n, p = salt.size, share / 2
    for hit in (salt, pepper):
        assert abs(hit.sum() - n * p) < LIMIT * math.sqrt(n * p * (1 - p))
        neighbours = (hit[:, 1:] & hit[:, :-1]).sum()
        # two neighbours are hit with chance p²; overlapping pairs widen the spread by 2p at most
        assert abs(neighbours - n * p**2) < LIMIT * math.sqrt(n * p**2 * (1 + 2 * p)) + p**2 * 128


def test_motion_blur_draws_its_angle_from_the_seed() -> None:
    """Uniform in ±45°: a dot's trail leads to one side, up or down."""
    dot = np.zeros((41, 41, 3), np.uint8)
    dot[20, 20] = 255
    specs = [ViewSpec("motion_blur", (6.0, 6.0))] * 40
    rows, columns = np.indices((41, 41))
    degrees = []
    for moved in degrade_batch([dot] * 40, specs, range(40), corruptions=UNSCALED):
        weight = moved[..., 0].astype(float)
        degrees.append(
            math.degrees(
                math.atan2(
                    weight.ravel() @ (20 - rows).ravel(), weight.ravel() @ (20 - columns).ravel()
                )
            )
        )
    # 40 draws miss the outer 15 degrees of a side with chance (5/6)^40 = 7e-4; seeds are fixed
    assert -46 < min(degrees) < -30 and 30 < max(degrees) < 46
