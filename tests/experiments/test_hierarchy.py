"""Intervals over seeds and images: both are in them, each once."""

import numpy as np
import pytest
from scipy.stats import t as student

from experiments import coverage
from experiments.report.hierarchy import Hierarchy
from roma.evaluate.intervals import Bootstrap


def test_of_one_seed_they_are_the_bootstraps() -> None:
    scores = np.random.default_rng(0).random((1, 3, 40))
    other = scores[:, ::-1]
    ours, images = Hierarchy(40, resamples=500), Bootstrap(40, resamples=500)
    assert ours.intervals(scores) == images.intervals(scores[0])
    assert ours.differences(scores, other) == images.differences(scores[0], other[0])


def test_where_images_are_alike_they_are_students() -> None:
    """The classical interval of five means; images have nothing of their own."""
    means = np.array([0.70, 0.72, 0.69, 0.75, 0.73])
    scores = np.broadcast_to(means[:, None, None], (5, 1, 3000))
    (found,) = Hierarchy(3000, resamples=4000).intervals(scores)
    half = 100 * student.ppf(0.975, 4) * means.std(ddof=1) / np.sqrt(5)
    # 16,000 draws: an end of Student's t with 4 degrees varies by 2 % of the half.
    assert found.high - found.mean == pytest.approx(half, rel=0.06)
    assert found.mean - found.low == pytest.approx(half, rel=0.06)


def test_where_seeds_are_alike_they_are_the_images() -> None:
    images = (np.arange(60) % 3 == 0).astype(float)
    scores = np.broadcast_to(images, (5, 1, 60))
    (found,) = Hierarchy(60).intervals(scores)
    (alone,) = Bootstrap(60).intervals(images[None])
    # The same draws, each four times: percentiles are at most a rank apart.
    assert found.low == pytest.approx(alone.low, abs=0.1)
    assert found.high == pytest.approx(alone.high, abs=0.1)


def test_noise_of_single_answers_is_counted_once() -> None:
    """Every answer a coin's throw: the classical interval of five means has all there is."""
    throws = np.random.default_rng(1).random((200, 5, 1, 200)) < 0.6
    found = [each for rows in throws for each in Hierarchy(200, resamples=500).intervals(rows)]
    halves = np.mean([each.high - each.low for each in found]) / 2
    error = 100 * np.sqrt(0.6 * 0.4 / (5 * 200))
    # Student's 2.78 by the mean of a standard deviation of five, 0.94, is 2.61; the wider of it and
    # the images' 1.96 is a little more; the root of both squares would be 3.26.
    assert 2.6 < halves / error < 3.0


def test_seeds_that_agree_do_not_make_it_narrower_than_images_do() -> None:
    """Two seeds, each right on other images, as many of them."""
    first = (np.arange(100) < 70).astype(float)
    rows = np.stack([first, np.roll(first, 30)])[:, None]
    (found,), (alone,) = Hierarchy(100).intervals(rows), Bootstrap(100).intervals(rows.mean(0))
    assert found.low <= alone.low and found.high >= alone.high and alone.high - alone.low > 5


def test_they_cover_where_seeds_matter_and_the_images_alone_do_not() -> None:
    found = coverage.over_seeds(5, 0.02, sets=60)
    # Three standard deviations of 60 experiments: 8.5 %.
    assert found["hierarchy"] >= 0.95 - 0.085
    assert found["images"] < 0.8


@pytest.mark.parametrize("scores", [np.zeros((2, 3)), np.zeros((0, 1, 4))])
def test_scores_of_another_shape(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"scores: expected \[S, M, n\], a seed at least"):
        Hierarchy(4).intervals(scores)


def test_arms_of_other_seeds() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 1, 4\] and \[3, 1, 4\]; give both arms the"):
        Hierarchy(4).differences(np.zeros((2, 1, 4)), np.zeros((3, 1, 4)))
