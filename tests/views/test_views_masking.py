"""patch_mask: whole patches of 14 pixels are black, as many as the chance says."""

import math

import numpy as np
import pytest
from support.views_checks import LIMIT
from support.views_reference import picture

from roma.views import CORRUPTIONS, degrade, sample


def black(height: int, width: int, chance: float, seed: int) -> np.ndarray:
    """[rows, columns] bool: the patches that are; others must be the image, pixel by pixel."""
    image = picture(height, width).clip(1)
    view = degrade(image, "patch_mask", parameter=chance, seed=seed)
    found = np.zeros((-(-height // 14), -(-width // 14)), dtype=bool)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            place = np.s_[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            found[row, column] = not view[place].any()
            if not found[row, column]:
                np.testing.assert_array_equal(view[place], image[place])
    return found


@pytest.mark.parametrize("height, width", [(1, 1), (14, 14), (15, 43), (32, 64), (448, 300)])
def test_whole_patches_are_black_and_nothing_else(height: int, width: int) -> None:
    """Those at the edge are cut; a larger chance blackens the same and more."""
    some, more = black(height, width, 0.3, seed=5), black(height, width, 0.7, seed=5)
    assert (some <= more).all()
    assert black(height, width, 1.0, seed=5).all()


@pytest.mark.parametrize("chance", [0.2, 0.6, 0.9])
def test_patches_are_independent_with_the_chance(chance: float) -> None:
    """Share of 40 × 40 patches within LIMIT standard errors; neighbours and seeds unrelated."""
    first, second = (black(560, 560, chance, seed) for seed in (0, 1))
    spread = math.sqrt(chance * (1 - chance) / first.size)
    assert abs(first.mean() - chance) < LIMIT * spread
    unit = (first - chance) / math.sqrt(chance * (1 - chance))
    other = (second - chance) / math.sqrt(chance * (1 - chance))
    assert abs((unit * other).mean()) < LIMIT / 40
    assert abs((unit[:, 1:] * unit[:, :-1]).mean()) < LIMIT / math.sqrt(40 * 39)


def test_it_is_not_scaled_and_no_other_pool_draws_it() -> None:
    """A patch has 14 pixels of the image itself, whatever its size; level 3 is PAPO's chance."""
    assert CORRUPTIONS["patch_mask"].reference_size is None
    assert CORRUPTIONS["patch_mask"].parameter(3) == 0.6
    for pool, size in (("seen", 4), ("unseen", 5), ("extra", 8)):
        assert "patch_mask" not in {spec.corruption for spec in sample(pool, size, (0,))}
    assert [spec.corruption for spec in sample("masking", 1, (0,))] == ["patch_mask"]
