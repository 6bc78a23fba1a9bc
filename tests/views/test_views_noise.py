"""Counted words and normal noise: Philox's definition, and the same bits however they are made."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from support.views_checks import LIMIT
from support.views_reference import misfit, picture

from roma.views import noise

CPU = torch.device("cpu")
SEEDS = (0, 1, 12345678901234567, 2**64 - 1)
COUNTS = (1, 63, 64, 65, 1000, 64 * 64 * 3 + 5)


def philox(key: int, counter: int) -> list[int]:
    """Four words, from Salmon et al., SC 2011, in whole numbers."""
    c = [counter % 2**32, counter >> 32, 0, 0]
    k = [key % 2**32, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            second >> 32 ^ c[1] ^ k[0],
            second % 2**32,
            first >> 32 ^ c[3] ^ k[1],
            first % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or without a C++ compiler."""
    monkeypatch.setattr(noise, "_library", lambda: None)


def test_philox_has_its_known_answer() -> None:
    """Of Random123's known-answer tests, the one whose key and counter are 0."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_philox(seed: int, in_pytorch: None) -> None:
    """Block after block of sixteen counters: word 0 of each, then word 1, 2 and 3."""
    found = noise.random_words(seed, 200, CPU).tolist()
    for i in (0, 5, 16, 37, 48, 63, 64, 127, 128, 199):
        block, word, counter = i // 64, i % 64 // 16, i % 16
        assert found[i] == philox(seed, 16 * block + counter)[word]


@pytest.mark.parametrize("seed", SEEDS)
def test_native_words_are_pytorchs(seed: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = [noise.random_words(seed, count, CPU) for count in COUNTS]
    monkeypatch.setattr(noise, "_library", lambda: None)
    for count, found in zip(COUNTS, native, strict=True):
        assert torch.equal(found, noise.random_words(seed, count, CPU))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("proportional", (False, True))
def test_native_noise_is_pytorchs_bit_for_bit(
    seed: int, proportional: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every instruction set, whatever the tail of the last block."""
    scale = 0.35 if proportional else 25.5
    images = [torch.from_numpy(picture(*size, seed=3)) for size in ((1, 1), (7, 3), (45, 71))]
    native = [noise.add_noise(x, seed, scale, proportional=proportional) for x in images]
    monkeypatch.setattr(noise, "_library", lambda: None)
    for image, found in zip(images, native, strict=True):
        assert torch.equal(found, noise.add_noise(image, seed, scale, proportional=proportional))


@pytest.mark.parametrize("share", (0.0, 1e-9, 0.06, 1.0))
@pytest.mark.parametrize("whole_pixels", (False, True))
def test_native_impulses_are_pytorchs_bit_for_bit(
    whole_pixels: bool, share: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [torch.from_numpy(picture(*size, seed=3)) for size in ((1, 1), (7, 3), (45, 71))]
    options = {"share": share, "whole_pixels": whole_pixels}
    native = [noise.add_impulses(x, 2**64 - 1, **options) for x in images]
    monkeypatch.setattr(noise, "_library", lambda: None)
    for image, found in zip(images, native, strict=True):
        assert torch.equal(found, noise.add_impulses(image, 2**64 - 1, **options))


def test_normal_numbers_are_normal() -> None:
    """2²⁰ of them: Kolmogorov-Smirnov, moments, neighbours, and the two of a pair of words."""
    found = noise._normals(7, 2**20, CPU).double().numpy()
    # P(√n·D > 2.7) is 2·exp(-2·2.7²) = 9e-7
    assert stats.kstest(found, "norm").statistic * math.sqrt(found.size) < 2.7
    assert misfit(found.reshape(-1, 512, 4), 1.0) < LIMIT
    blocks = found.reshape(-1, 4, 16)
    for first in range(4):
        for second in range(first):
            product = (blocks[:, first] * blocks[:, second]).mean()
            assert abs(product) < LIMIT / math.sqrt(blocks[:, 0].size)
            # a pair has a radius in common: its squares are uncorrelated if the angle is right
            squares = ((blocks[:, first] ** 2 - 1) * (blocks[:, second] ** 2 - 1)).mean()
            assert abs(squares) < LIMIT * 2 / math.sqrt(blocks[:, 0].size)
    # 24 bits end at √(2·24·ln 2) = 5.77; of 2²⁰ draws one is beyond 4.4 but with chance 1e-5
    assert 4.4 < np.abs(found).max() < 5.78


def test_normal_numbers_against_float64() -> None:
    """At the ends of both words and between; 1e-6 is eight units of fp32 at 1."""
    ends = [0, 1, 255, 256, 2**24, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1]
    drawn = noise.random_words(3, 4000, CPU).tolist()
    pairs = [(a, b) for a in ends for b in ends] + list(zip(drawn[::2], drawn[1::2], strict=True))
    words = torch.tensor(pairs)
    first, second = noise._box_muller(words[:, 0], words[:, 1])
    u = ((words[:, 0] >> 8).double() + 1) / 2**24
    # the angle that the 30 bits below the quarter mean, its lowest 6 cut off, in -1/8..1/8 turns
    low = words[:, 1] % 2**30
    rest = torch.where(low >= 2**29, low - 2**30, low)
    angle = math.tau * ((words[:, 1] >> 30).double() / 4 + (rest // 64).double() * 64 / 2**32)
    radius = (-2 * u.log()).sqrt()
    bound = 1e-6 * (1 + radius)
    assert ((first - radius * angle.cos()).abs() <= bound).all()
    assert ((second - radius * angle.sin()).abs() <= bound).all()
