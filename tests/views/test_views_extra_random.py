"""The extra corruptions that draw: impulse and shot noise, fog; against their distributions."""

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from support.views_checks import LIMIT, ROUNDED_ONCE, correlation, error, flat, view
from support.views_reference import Pixels, picture

from roma.views import CORRUPTIONS, ViewSpec, degrade_batch

Floats = NDArray[np.float64]


# Noise


@pytest.mark.parametrize("share", (*CORRUPTIONS["impulse_noise"].levels, 1.0))
def test_impulse_noise_hits_its_share_of_values(share: float) -> None:
    """Each channel is drawn independently, salt and pepper alike."""
    found = view(flat(100, 128, 192), "impulse_noise", share, seed=4)
    salt, pepper = found == 255, found == 0
    assert (salt | pepper | (found == 100)).all()
    n, p = found.size, share / 2
    for kind in (salt, pepper):
        assert abs(kind.sum() - n * p) < LIMIT * math.sqrt(n * p * (1 - p))
    # salt less pepper: each value adds -1, 0 or 1 with variance `share`
    assert abs(int(salt.sum()) - int(pepper.sum())) < LIMIT * math.sqrt(n * share)
    # of n independent pairs the correlation has standard error 1/√n
    for hit in (salt, pepper) if share == 1 else (salt, pepper, salt | pepper):
        for first, second in ((0, 1), (1, 2), (0, 2)):
            found_correlation = correlation(hit[..., first], hit[..., second])
            assert abs(found_correlation) < LIMIT / math.sqrt(hit[..., 0].size)
        for first, second in ((hit[1:], hit[:-1]), (hit[:, 1:], hit[:, :-1])):
            assert abs(correlation(first, second)) < LIMIT / math.sqrt(first.size)


def test_impulse_noise_hits_black_and_white_too() -> None:
    """A hit does not look at the value: half of them show on either."""
    for value in (0, 255):
        found = view(flat(value, 128, 128), "impulse_noise", 0.27, seed=5)
        hits, n, p = (found == 255 - value).sum(), found.size, 0.135
        assert (found != value).sum() == hits
        assert abs(hits - n * p) < LIMIT * math.sqrt(n * p * (1 - p))


def photons(value: int, p: float) -> tuple[Floats, Floats, Floats]:
    """Counts that a value may get, their chances, and the values that they become."""
    mean = value / (255 * p)
    reach = 12 * math.sqrt(mean) + 30
    counts = np.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach) + 1)
    return counts, stats.poisson.pmf(counts, mean), np.minimum(255 * p * counts, 255)


def distance(found: Pixels, value: int, p: float) -> float:
    """√n times the largest gap between the two distribution functions of a value.

    Half values may round either way, so that the function is not asked between them.
    """
    _, chances, values = photons(value, p)
    gaps = []
    for v in range(256):
        if v == 255 or np.abs(values - v - 0.5).min() > 1e-6:
            gaps.append((found <= v).mean() - chances[values < v + 0.5].sum())
    return math.sqrt(found.size) * max(map(abs, gaps))


# Kolmogorov: √n·D exceeds t with chance below 2·exp(-2t²), 9e-7 here; less for whole numbers.
FAR = 2.7
# The five levels, and few to very many photons; 1/odd never gives a half value.
SHARES = (*CORRUPTIONS["shot_noise"].levels, 1.0, 1 / 9, 1 / 333, 1 / 1777, 1 / 100003)


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("value", (1, 20, 128, 255))
def test_shot_noise_has_its_distribution(value: int, p: float) -> None:
    found = view(flat(value, 128, 128), "shot_noise", p, seed=6)
    assert distance(found, value, p) < FAR
    # Mean and variance of rounded and clipped values, which a half value moves by its chance / 2.
    _, chances, values = photons(value, p)
    values = np.rint(values)
    mean = chances @ values
    variance = chances @ (values - mean) ** 2
    fourth = chances @ (values - mean) ** 4
    n = found.size
    if round(1 / p) % 2:
        assert abs(found.mean() - mean) <= LIMIT * math.sqrt(variance / n) + 1e-9
        spread = abs(((found - mean) ** 2).mean() - variance)
        assert spread <= LIMIT * math.sqrt(max(fourth - variance**2, 0) / n) + 1e-9


@pytest.mark.parametrize("p", (1 / 60, 1 / 5, 1 / 1777))
def test_shot_noise_is_independent(p: float) -> None:
    """Of channels and of neighbours; another seed is other noise."""
    gray = flat(100, 128, 128)
    found, other = degrade_batch([gray] * 2, [ViewSpec("shot_noise", p)] * 2, [10, 11])
    for first, second in (
        (found[..., 0], found[..., 1]),
        (found[..., 1], found[..., 2]),
        (found[..., 0], found[..., 2]),
        (found[1:], found[:-1]),
        (found[:, 1:], found[:, :-1]),
        (found, other),
    ):
        assert abs(correlation(first, second)) < LIMIT / math.sqrt(first.size)


def test_shot_noise_leaves_black_black() -> None:
    """Each value is drawn independently of its neighbours."""
    image = flat(0, 128, 128)
    image[::2, :, 1] = 128
    for p in SHARES:
        found = view(image, "shot_noise", p, seed=7)
        assert not found[image == 0].any()
        assert distance(found[image == 128], 128, p) < FAR


def test_bounds_of_shot_noise_bite() -> None:
    """A tenth more photons, normal noise of the same variance and one draw for all channels."""
    found = view(flat(128, 128, 128), "shot_noise", 1 / 25, seed=6)
    assert distance(found, 128, 1.1 / 25) > FAR
    assert distance(found, 129, 1 / 25) > FAR
    sigma = 255 * math.sqrt(128 / 255 / 25)
    normal = np.random.default_rng(0).normal(128, sigma, found.shape)
    assert distance(np.rint(normal).clip(0, 255).astype(np.uint8), 128, 1 / 25) > FAR


# Fog


FOGS = CORRUPTIONS["fog"].levels


def cloud(decay: float, seed: int, size: tuple[int, int] = (64, 64)) -> Floats:
    """[height, width] in 0..1, read off a white image: 255·(1 + amount·cloud)/(1 + amount).

    With an amount of 1e6 it is known to half of a 255th.
    """
    return view(flat(255, *size), "fog", (1e6, decay), seed)[..., 0] / 255


@pytest.mark.parametrize("amount, decay", FOGS)
@pytest.mark.parametrize("value", (255, 130, 3))
def test_fog_spans_its_range(value: int, amount: float, decay: float) -> None:
    """One value gives the same to all channels, from no cloud to the thickest."""
    found = view(flat(value, 64, 64), "fog", (amount, decay), seed=8)
    m = value / 255
    lowest = 255 * m * m / (m + amount)
    assert found.min() == pytest.approx(lowest, abs=ROUNDED_ONCE)
    assert found.max() == value
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("amount, decay", FOGS)
@pytest.mark.parametrize("size", ((64, 64), (17, 31), (1, 5), (7, 1)))
def test_fog_equals_its_definition(size: tuple[int, int], amount: float, decay: float) -> None:
    """The cloud depends on seed, decay and size alone, so that another image tells it."""
    thick = cloud(decay, 9, size)[..., None]
    for image in (picture(*size), picture(*size) // 2):
        found = view(image, "fog", (amount, decay), seed=9)
        m = image.max() / 255
        share = m / (m + amount)
        # the cloud is known to 0.5/255, and amount·share < 1 multiplies it
        bound = ROUNDED_ONCE + 0.5 * amount * share
        assert error(found, (image + 255 * amount * thick) * share) <= bound
        if min(size) > 8:
            assert error(found, (image + 255 * amount * thick) * share * 1.02) > bound
            assert error(found, (image + 255 * amount * thick[::-1]) * share) > bound


def test_fog_of_a_black_image_is_black() -> None:
    """There m is 0."""
    np.testing.assert_array_equal(view(flat(0, 9, 14), "fog", (3.0, 1.4)), flat(0, 9, 14))


def test_fog_is_smooth_and_of_its_seed() -> None:
    clouds = [cloud(2.0, seed) for seed in range(10)]
    for each in clouds:
        assert correlation(each[1:], each[:-1]) > 0.9
        assert correlation(each[:, 1:], each[:, :-1]) > 0.9
    for first, second in pairwise(clouds):
        assert np.abs(first - second).mean() > 0.05
    np.testing.assert_array_equal(clouds[3], cloud(2.0, 3))


def roughness(each: Floats) -> float:
    """The mean absolute difference of neighbours."""
    return float(np.abs(np.diff(each, axis=0)).mean() + np.abs(np.diff(each, axis=1)).mean()) / 2


def diamonds_and_squares(size: int, decay: float, rng: np.random.Generator) -> Floats:
    """Means of four corners and noise decay² times less at each halving; the borders join."""
    found = np.zeros((size, size))
    step, noise = size, 1.0

    def filled(*corners: Floats) -> Floats:
        return sum(corners) / 4 + rng.uniform(-noise, noise, corners[0].shape)

    while step >= 2:
        half = step // 2
        corner = found[::step, ::step]
        right, below = np.roll(corner, -1, axis=1), np.roll(corner, -1, axis=0)
        centre = filled(corner, right, below, np.roll(right, -1, axis=0))
        found[half::step, half::step] = centre
        found[::step, half::step] = filled(corner, right, centre, np.roll(centre, 1, axis=0))
        found[half::step, ::step] = filled(corner, below, centre, np.roll(centre, 1, axis=1))
        step, noise = half, noise / decay**2
    found -= found.min()
    return found / found.max()


def test_lower_decay_is_rougher_fog() -> None:
    """Means over 20 seeds."""
    decays = (2.0, 1.7, 1.4, 1.1)
    means = [np.mean([roughness(cloud(d, seed)) for seed in range(20)]) for d in decays]
    assert means == sorted(means) and means[-1] > 2 * means[0]


@pytest.mark.parametrize("decay", (2.0, 1.7, 1.4))
def test_fog_is_imagenet_cs_in_distribution(decay: float) -> None:
    """Means over 100 clouds of five statistics agree with those of plasma fractals."""
    rng = np.random.default_rng(0)

    def statistics(each: Floats) -> list[float]:
        return [
            each.mean(),
            each.std(),
            roughness(each),
            roughness(each[::4, ::4]),
            roughness(each[::16, ::16]),
        ]

    found = np.array([statistics(cloud(decay, seed)) for seed in range(100)])
    # rounded as the cloud above is
    drawn = [np.rint(255 * diamonds_and_squares(64, decay, rng)) / 255 for _ in range(100)]
    expected = np.array([statistics(each) for each in drawn])
    gap = found.mean(axis=0) - expected.mean(axis=0)
    spread = np.sqrt((found.var(axis=0, ddof=1) + expected.var(axis=0, ddof=1)) / 100)
    assert (np.abs(gap) < LIMIT * spread).all(), gap / spread
