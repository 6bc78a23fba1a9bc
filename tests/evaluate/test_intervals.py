"""Intervals: the bootstrap against brute force, equal scores against scipy."""

import itertools

import numpy as np
import pytest

from roma.evaluate.intervals import Bootstrap, macro

RESAMPLES = 10_000


def test_macro_average_by_hand():
    assert macro([[1, 0, 1, 1], [0, 0, 1, 0]]).tolist() == [0.5, 0.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"scores: expected \[C, n\].*got \[3\]"):
        macro([1, 0, 1])


def test_the_bootstrap_is_the_exact_distribution_over_all_resamples():
    """Four images have 4^4 equally likely resamples; each mean's share must match its probability.

    Bound: 5 standard deviations of a share of R draws, √(p(1 − p)/R).
    """
    scores = np.array([0.0, 0.25, 0.5, 1.0])
    exact = np.array([scores[list(draw)].mean() for draw in itertools.product(range(4), repeat=4)])
    drawn = Bootstrap(4, resamples=RESAMPLES, seed=3).means([scores])[:, 0]
    for value in np.unique(exact):
        share = np.isclose(exact, value).mean()
        bound = 5 * np.sqrt(share * (1 - share) / RESAMPLES)
        assert abs(np.isclose(drawn, value).mean() - share) <= bound


def test_the_interval_of_a_proportion_is_the_binomial_quantile():
    """n·mean_r ~ Binomial(n, p̂): the interval's ends are that distribution's quantiles.

    A quantile q of R draws lies, at 5 standard deviations, between the exact quantiles of
    q ± 5·√(q(1 − q)/R).
    """
    from scipy.stats import binom

    n, right = 500, 380
    scores = np.repeat([1.0, 0.0], [right, n - right])
    (interval,) = Bootstrap(n, resamples=RESAMPLES, seed=11).intervals([scores])
    assert interval.mean == pytest.approx(76.0)
    for end, quantile in ((interval.low, 0.025), (interval.high, 0.975)):
        slack = 5 * np.sqrt(quantile * (1 - quantile) / RESAMPLES)
        least, most = binom.ppf([quantile - slack, quantile + slack], n, right / n) * 100 / n
        assert least <= end <= most


def test_a_paired_difference_is_narrower_than_two_independent_arms():
    """Two arms that share hard images: the interval's width is that of the per-image differences.

    The normal width 2·1.96·sd(a − b)/√n holds for n = 2000; bound: 5 % covers the Monte-Carlo error
    of a 2.5 % quantile, √(.025·.975/R)/φ(1.96)/1.96 = 1.4 % of the half-width, at 3 sd.
    """
    rng = np.random.default_rng(5)
    hard = rng.random(2000)
    first, second = (hard < 0.8).astype(float), (hard + rng.normal(0, 0.05, 2000) < 0.76) * 1.0
    (paired,) = Bootstrap(2000, resamples=RESAMPLES).differences([first], [second])
    half = 100 * 1.96 * (first - second).std() / np.sqrt(2000)
    assert (paired.high - paired.low) / 2 == pytest.approx(half, rel=0.05)
    apart = 100 * 1.96 * np.sqrt((first.var() + second.var()) / 2000)
    assert (paired.high - paired.low) / 2 < 0.6 * apart
    assert paired.mean == pytest.approx(100 * (first.mean() - second.mean()))


def test_rows_are_resampled_alike_so_a_difference_of_means_is_the_mean_of_differences():
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, 2, (2, 40)) * 1.0
    together = Bootstrap(40, seed=2).means([first, second, first - second])
    np.testing.assert_allclose(together[:, 0] - together[:, 1], together[:, 2], atol=1e-12)
    (interval,) = Bootstrap(40, seed=2).differences([first], [second])
    low, high = 100 * np.percentile(together[:, 2], [2.5, 97.5])
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("n", [1, 2, 40, 500])
@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_equal_scores_have_the_clopper_pearson_interval(n, coverage):
    """None and all right of n, against scipy; so a bootstrap of constants is no interval."""
    from scipy.stats import binomtest

    none, every = Bootstrap(n, coverage=coverage).intervals([np.zeros(n), np.ones(n)])
    for found, right in ((none, 0), (every, n)):
        exact = binomtest(right, n).proportion_ci(coverage, method="exact")
        assert found.low == pytest.approx(100 * exact.low, abs=1e-9)
        assert found.high == pytest.approx(100 * exact.high, abs=1e-9)
        assert found.low < found.high and found.mean == 100 * right / n


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0])
def test_equal_differences_leave_room_for_images_that_were_not_drawn(value):
    """Two arms that agree on all images may differ on the share of others that n allows."""
    from scipy.stats import binomtest

    first = np.full(40, max(value, 0.0))
    (found,) = Bootstrap(40).differences([first], [first - value])
    share = binomtest(40, 40).proportion_ci(0.95, method="exact").low
    assert found.mean == 100 * value
    assert found.low == pytest.approx(100 * (share * value - (1 - share)))
    assert found.high == pytest.approx(100 * (share * value + (1 - share)))
    assert found.low < found.high


def test_equal_averages_between_the_ends_have_an_interval_too():
    """One corruption right and one wrong on every image: 50, but not [50, 50]."""
    scores = macro([np.ones(10), np.zeros(10)])
    (found,) = Bootstrap(10).intervals([scores])
    share = 0.025 ** (1 / 10)
    assert found.mean == 50
    assert (found.low, found.high) == (
        pytest.approx(50 * share),
        pytest.approx(50 * share + 100 * (1 - share)),
    )
    rounded = scores + np.linspace(0, 1e-15, 10)  # as an average over seeds may leave it
    assert Bootstrap(10).intervals([rounded])[0].as_dict() == found.as_dict()


@pytest.mark.parametrize("right", [0.02, 0.98])
def test_equal_scores_of_few_images_hold_the_truth(right):
    """Eight images, mostly all wrong or all right: the interval contains the accuracy drawn from.

    That of a bootstrap, [0, 0] or [100, 100], never would.
    """
    drawn = np.random.default_rng(0).random((400, 8)) < right
    equal = [row for row in drawn if row.min() == row.max()]
    found = Bootstrap(8, resamples=50).intervals(np.array(equal, dtype=float))
    assert len(found) > 300
    assert all(each.low <= 100 * right <= each.high for each in found)


def test_differences_are_not_taken_for_accuracies():
    with pytest.raises(ValueError, match=r"scores: expected values from 0 to 1, got -1 to 0; give"):
        Bootstrap(2).intervals([[0, -1]])
    with pytest.raises(ValueError, match=r"scores: expected values from -1 to 1, got 0 to 2"):
        Bootstrap(2).differences([[2, 0]], [[0, 0]])


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    scores = np.random.default_rng(0).integers(0, 2, 57) * 1.0
    assert Bootstrap(57, seed=4).intervals([scores]) == Bootstrap(57, seed=4).intervals([scores])
    assert (Bootstrap(57, seed=4).means([scores]) != Bootstrap(57, seed=5).means([scores])).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Bootstrap(0), "images: expected at least 1, got 0"),
        (lambda: Bootstrap(3, resamples=0), "resamples: expected at least 1, got 0"),
        (lambda: Bootstrap(3, coverage=95), "coverage: expected a number between 0 and 1, got 95"),
        (
            lambda: Bootstrap(3).intervals([1, 0]),
            r"scores: expected \[M, n\] = \[M, 3\], got \[2\]",
        ),
        (lambda: Bootstrap(3).intervals([[1, 0]]), r"got \[1, 2\]; give every arm the same"),
    ],
)
def test_wrong_input_to_the_bootstrap_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
