"""Degraded views: against references without DALI, and what training and evaluation rely on."""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import views_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from views_reference import picture, smooth

from roma.views import (
    CORRUPTIONS,
    ViewSpec,
    degrade,
    degrade_batch,
    load_levels,
    operators,
    sample,
    seed_for,
)

DEMO_LEVELS = Path(__file__).parent.parent / "configs" / "demo_levels.yaml"
# No scaling, so that a parameter means the same at every size.
UNSCALED = {name: replace(c, reference_size=None) for name, c in CORRUPTIONS.items()}
NOISES = ("gaussian_noise", "speckle", "salt_and_pepper")

# One pixel, a line, sides that no block, chroma or shrinking factor divides, and the demo's size.
SIZES = ((1, 1), (1, 5), (7, 1), (2, 3), (3, 70), (17, 31), (32, 64), (70, 90))

# Values against references. "Rounded once" is half a level, and fp32 sums of weights that add up to
# 1 err by less than 1e-3 of a level at 255 (255·√n·2⁻²⁴ for n taps).
ROUNDED_ONCE = 0.5 + 1e-3


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

    def error(name: str, parameter: float | tuple[float, float], expected: np.ndarray) -> float:
        found = degrade(image, name, parameter=parameter, seed=5, corruptions=UNSCALED)
        return float(np.abs(found - expected).max())

    degrees = operators.generator(5).uniform(-45, 45)
    for sigma in (0.3, 1.0, 2.4, 3.7):
        expected = reference.gaussian_blur(image, sigma)
        roundings = 1 if sigma < operators._SEPARABLE else 2
        assert error("gaussian_blur", sigma, expected) <= roundings * ROUNDED_ONCE
        expected = reference.motion_blur(image, 2.5 * sigma, sigma, degrees)
        assert error("motion_blur", (2.5 * sigma, sigma), expected) <= ROUNDED_ONCE
    for factor in (0.01, 0.15, 0.33, 0.8):
        assert error("pixelate", factor, reference.pixelate(image, factor)) <= ROUNDED_ONCE
        # the small image is rounded too, and the way up averages it
        assert error("downscale", factor, reference.downscale(image, factor)) <= 2 * ROUNDED_ONCE


@pytest.mark.parametrize("sigma", (2.5, 4.0, 9.0))
def test_two_roundings_of_a_wide_blur_move_little(sigma: float) -> None:
    """Values between passes are off by 0.29 (rms) each, and the second pass averages them: 0.8·0.29
    ·√Σw² levels are moved in the mean, which is 0.08 at sigma 2.5 and less above."""
    image = smooth(96, 128)
    found = degrade(image, "gaussian_blur", parameter=sigma, seed=0, corruptions=UNSCALED)
    away = np.abs(found - np.rint(reference.gaussian_blur(image, sigma)))
    assert away.max() <= 1 and away.mean() <= 0.1


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

    def error(name: str, parameter: float, expected: np.ndarray) -> float:
        found = degrade(image, name, parameter=parameter, seed=5, corruptions=UNSCALED)
        return float(np.abs(found - expected).max())

    blurred = reference.gaussian_blur(image, 1.0)
    assert error("gaussian_blur", 1.1, blurred) > 5
    assert error("gaussian_blur", 1.0, np.roll(blurred, 1, axis=1)) > 5
    assert error("downscale", 0.5, reference.downscale(image, 0.53)) > 5
    assert error("pixelate", 0.5, reference.pixelate(image, 0.53)) > 5


def test_scaling_by_the_shorter_side() -> None:
    """A blur of 224 pixels' sigma 2 is one of sigma 0.5 at 56 by 80, unless the table says no."""
    image = picture(56, 80)
    scaled = degrade(image, "gaussian_blur", parameter=2.0, seed=0)
    np.testing.assert_array_equal(
        scaled, degrade(image, "gaussian_blur", parameter=0.5, seed=0, corruptions=UNSCALED)
    )
    moved = degrade(image, "motion_blur", parameter=(12.0, 8.0), seed=0)
    np.testing.assert_array_equal(
        moved, degrade(image, "motion_blur", parameter=(3.0, 2.0), seed=0, corruptions=UNSCALED)
    )


# Noise, by distribution. Seeds are fixed, so a bound of 5 standard errors either holds or does not;
# for a right generator the chance that a new seed breaks one is 6e-7 a statistic.
LIMIT = 5.0


def test_gaussian_noise_has_its_distribution() -> None:
    """Mid gray, so that nothing clips (5 sigma = 127); rounding adds a variance of 1/12."""
    gray = np.full((128, 128, 3), 128, np.uint8)
    noise = degrade(gray, "gaussian_noise", parameter=0.1, seed=1).astype(float) - 128
    variance = 25.5**2 + 1 / 12
    assert reference.misfit(noise, variance) < LIMIT
    # n = 49152: the variance is known to 0.6 %, so planted errors are far out
    assert reference.misfit(1.1 * noise, variance) > LIMIT
    assert reference.misfit(np.repeat(noise[:, ::2], 2, axis=1), variance) > LIMIT
    assert reference.misfit(np.repeat(noise[..., :1], 3, axis=2), variance) > LIMIT
    flat = np.random.default_rng(0).uniform(-1, 1, gray.shape) * math.sqrt(3 * variance)
    assert reference.misfit(flat, variance) > LIMIT


def test_speckle_has_its_distribution() -> None:
    """Its noise is proportional to the pixel: black stays black."""
    for value in (0, 40, 120):
        plain = np.full((128, 128, 3), value, np.uint8)
        noise = degrade(plain, "speckle", parameter=0.2, seed=2).astype(float) - value
        if value:
            assert reference.misfit(noise, (0.2 * value) ** 2 + 1 / 12) < LIMIT
        else:
            assert not noise.any()


@pytest.mark.parametrize("name", ("gaussian_noise", "speckle"))
def test_noise_clips(name: str) -> None:
    """Half of the draws on white stay white; none wraps around to black."""
    white = np.full((128, 128, 3), 255, np.uint8)
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
    gray = np.full((128, 192, 3), 100, np.uint8)
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
    for view in degrade_batch([dot] * 40, specs, range(40), corruptions=UNSCALED):
        weight = view[..., 0].astype(float)
        degrees.append(
            math.degrees(
                math.atan2(
                    weight.ravel() @ (20 - rows).ravel(), weight.ravel() @ (20 - columns).ravel()
                )
            )
        )
    # 40 draws miss the outer 15 degrees of a side with chance (5/6)^40 = 7e-4; seeds are fixed
    assert -46 < min(degrees) < -30 and 30 < max(degrees) < 46


# What training and evaluation rely on.


@settings(max_examples=25)
@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from((0.01, 0.7, 2.0, 3.0)))
def test_views_keep_size_and_type(
    first: tuple[int, int], second: tuple[int, int], level: float
) -> None:
    """Arrays and tensors of two sizes side by side; the originals stay as they are."""
    images = [picture(*first), torch.from_numpy(picture(*second, seed=1))]
    kept = [np.asarray(image).copy() for image in images]
    for corruption in CORRUPTIONS.values():
        spec = ViewSpec(corruption.name, corruption.parameter(level), level)
        views = degrade_batch(images, [spec] * 2, [3, 4])
        assert isinstance(views[0], np.ndarray) and views[0].dtype == np.uint8
        assert isinstance(views[1], torch.Tensor) and views[1].dtype == torch.uint8
        assert [tuple(view.shape) for view in views] == [(*first, 3), (*second, 3)]
    for image, before in zip(images, kept, strict=True):
        np.testing.assert_array_equal(np.asarray(image), before)


@settings(max_examples=15)
@given(st.randoms(use_true_random=False), st.integers(0, 2**63 - 1))
def test_a_view_depends_on_its_own_spec_and_seed_alone(order: random.Random, seed: int) -> None:
    """Shuffled, split and repeated batches of mixed sizes give the same pixels as single images."""
    images, specs, seeds = [], [], []
    for i, corruption in enumerate(CORRUPTIONS.values()):
        for level in (1.0, 2.5):
            images.append(picture(*SIZES[(i + 4 * int(level)) % len(SIZES)], seed=i))
            specs.append(ViewSpec(corruption.name, corruption.parameter(level), level))
            seeds.append(seed_for(seed, i % 3))
    alone = [
        degrade(image, spec.corruption, level=spec.level, seed=own)
        for image, spec, own in zip(images, specs, seeds, strict=True)
    ]
    chosen = order.choices(range(len(images)), k=order.choice((1, 5, 40)))
    batch = degrade_batch(
        [images[i] for i in chosen], [specs[i] for i in chosen], [seeds[i] for i in chosen]
    )
    for i, view in zip(chosen, batch, strict=True):
        np.testing.assert_array_equal(view, alone[i])


def test_hardly_any_blur_changes_nothing() -> None:
    """Levels start arbitrarily near 0, where sigma squared is 0 in fp32."""
    image = picture(17, 31)
    for sigma in (1e-300, 1e-30, 1e-9, 0.01):
        blurred = degrade(image, "gaussian_blur", parameter=sigma, seed=0)
        np.testing.assert_array_equal(blurred, image)
    for parameter in ((1e-300, 1e-300), (5.0, 1e-30), (5.0, 0.0), (0.0, 5.0)):
        moved = degrade(image, "motion_blur", parameter=parameter, seed=0)
        np.testing.assert_array_equal(moved, image)


def test_long_lists_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part an image falls into changes nothing."""
    images = [picture(17, 31, seed=i) for i in range(7)]
    specs = [ViewSpec("gaussian_noise", 0.1)] * 7
    whole = degrade_batch(images, specs, range(7))
    monkeypatch.setattr("roma.views.batch._JOB", 2 * 17 * 31 * 3)
    np.testing.assert_array_equal(whole, degrade_batch(images, specs, range(7)))


@pytest.mark.parametrize("name", NOISES)
def test_another_seed_is_other_noise(name: str) -> None:
    """Neighbouring seeds too: the noise of two is uncorrelated."""
    gray = np.full((64, 64, 3), 128, np.uint8)
    pair = degrade_batch([gray, gray], [ViewSpec(name, 0.1)] * 2, [10, 11])
    first, second = (view.astype(float).ravel() - view.mean() for view in pair)
    correlation = first @ second / math.sqrt((first @ first) * (second @ second))
    # salt and pepper hits whole pixels: 64² independent values, not 3·64²
    assert abs(correlation) < LIMIT / 64


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_level_0_is_the_image(name: str) -> None:
    """A copy of it."""
    image = picture(9, 14)
    for view in (
        degrade(image, name, level=0, seed=0),
        degrade(image, name, parameter=CORRUPTIONS[name].identity, seed=0),
    ):
        np.testing.assert_array_equal(view, image)
        assert not np.shares_memory(view, image)


@pytest.mark.parametrize("table", (CORRUPTIONS, load_levels(DEMO_LEVELS)), ids=("own", "demo"))
def test_stronger_levels_change_more(table: dict) -> None:
    """The mean over seeds of the mean absolute change grows from level to level.

    Posterize has the same parameter at L4 and L5.
    """
    image = smooth(112, 160) if table is CORRUPTIONS else smooth(32, 64)
    for corruption in table.values():
        if table is not CORRUPTIONS and corruption.pool == "extra":
            continue  # levels for images of 224 pixels
        changes = []
        for level in range(1 + len(corruption.levels)):
            spec = ViewSpec(corruption.name, corruption.parameter(level), float(level))
            views = degrade_batch([image] * 8, [spec] * 8, range(8), corruptions=table)
            changes.append(np.abs(np.stack(views) - image.astype(float)).mean())
        assert changes[0] == 0 and (np.diff(changes) >= 0).all(), (corruption.name, changes)
        assert len(set(changes)) == 1 + len(set(corruption.levels)), (corruption.name, changes)


def test_parameter_is_linear_between_levels() -> None:
    """And exact at them."""
    noise, blur = CORRUPTIONS["gaussian_noise"], CORRUPTIONS["motion_blur"]
    assert [noise.parameter(level) for level in range(6)] == [0.0, *noise.levels]
    assert noise.parameter(0.5) == 0.04 and noise.parameter(1.25) == 0.09
    assert CORRUPTIONS["jpeg"].parameter(0.2) == 85.0
    assert blur.parameter(1.5) == (12.5, 4.0) and blur.parameter(5) == blur.levels[4]
    assert noise.training_range == (0.0, 0.12)


# Sampling and seeds.


def test_sample_depends_on_its_key_alone() -> None:
    """Distinct kinds of the pool, levels up to the maximum, the same whenever it is asked."""
    draws = {}
    for prompt in range(300):
        specs = sample("seen", 3, (0, 1, prompt))
        assert len({spec.corruption for spec in specs}) == 3
        for spec in specs:
            corruption = CORRUPTIONS[spec.corruption]
            assert corruption.pool == "seen" and 0 < spec.level <= 2
            assert spec.parameter == corruption.parameter(spec.level)
        draws[prompt] = specs
    assert len({tuple(specs) for specs in draws.values()}) == 300
    for prompt in reversed(draws):
        assert sample("seen", 3, (0, 1, prompt)) == draws[prompt]
    assert sample("seen", 1, (0, 1, "7")) != sample("seen", 1, (0, 1, 7))
    assert sample("seen", 1, [0, 1, np.int64(7)]) == sample("seen", 1, (0, 1, 7))


@pytest.mark.parametrize("strength, power", (("uniform", 1), ("strong", 2)))
def test_sample_spreads_kinds_and_levels(strength: str, power: int) -> None:
    """Kinds are equally frequent; (level/maximum)^power is uniform (Kolmogorov-Smirnov)."""
    n = 4000
    specs = [
        sample("unseen", 1, (3, i), max_level=2.5, strength=strength)[0]  # type: ignore[arg-type]
        for i in range(n)
    ]
    p = 1 / 5
    for name in (c.name for c in CORRUPTIONS.values() if c.pool == "unseen"):
        count = sum(spec.corruption == name for spec in specs)
        assert abs(count - n * p) < LIMIT * math.sqrt(n * p * (1 - p))
    u = np.sort([(spec.level / 2.5) ** power for spec in specs])
    # P(√n·D > 2.7) is 2·exp(-2·2.7²) = 9e-7
    assert np.abs(u - (np.arange(n) + 0.5) / n).max() < 2.7 / math.sqrt(n)


def test_seeds_are_stable_and_distinct() -> None:
    """A golden value holds them to be the same on every machine and in later versions."""
    assert seed_for(0, 12, "row 7", 1) == 9176350762975265617
    keys = [(a, b) for a in range(-3, 20) for b in ("", "1", "a", 1, 12)]
    keys += [("a", "bc"), ("ab", "c"), ("abc",), (1, 23), (12, 3), (123,), ("123",), ()]
    seeds = [seed_for(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)


def test_no_global_generator_is_touched() -> None:
    """Neither read nor advanced: the same views whatever the global seeds are."""
    made = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)
        torch.manual_seed(start)
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        specs = sample("unseen", 5, (0, 1, "x")) + sample("seen", 4, (0, 1, "x"))
        made.append(degrade_batch([picture(16, 16)] * 9, specs, [seed_for(0, i) for i in range(9)]))
        after = random.getstate(), np.random.get_state(), torch.get_rng_state()
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    np.testing.assert_array_equal(made[0], made[1])
