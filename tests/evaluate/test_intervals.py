"""Intervals: the draws against scipy's Beta and by hand, and how often the intervals hold."""

import numpy as np
import pytest
from scipy import stats

from experiments import coverage
from roma.evaluate.intervals import Bootstrap, Interval, average, macro

RESAMPLES = 10_000


def draws(bootstrap, scores):
    return bootstrap.estimate(bootstrap.seen(scores)).draws


def test_macro_average_by_hand():
    assert macro([[1, 0, 1, 1], [0, 0, 1, 0]]).tolist() == [0.5, 0.0, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"scores: expected \[C, n\].*got \[3\]"):
        macro([1, 0, 1])


def _slack(quantile: float) -> float:
    """5 standard deviations of the share of R draws that lie below a quantile."""
    return 5 * np.sqrt(quantile * (1 - quantile) / RESAMPLES)


@pytest.mark.parametrize("cover", [0.9, 0.95])
@pytest.mark.parametrize(("n", "right"), [(1, 0), (2, 0), (5, 4), (40, 40), (500, 380)])
def test_the_interval_of_a_proportion_is_that_of_jeffreys(n, right, cover):
    """The ends are quantiles of Beta(k + ½, n − k + ½), but 0 where none is right, 1 where all."""
    scores = np.repeat([1.0, 0.0], [right, n - right])
    (found,) = Bootstrap(n, seed=11, coverage=cover).intervals([scores])
    assert found.mean == pytest.approx(100 * right / n)
    law, tail = stats.beta(right + 0.5, n - right + 0.5), (1 - cover) / 2
    for end, quantile, stuck in ((found.low, tail, 0), (found.high, 1 - tail, n)):
        if right == stuck:
            assert end == 100 * right / n
        else:
            least, most = law.ppf([quantile - _slack(quantile), quantile + _slack(quantile)])
            assert 100 * least <= end <= 100 * most


def test_the_draws_of_scores_in_between_have_the_moments_of_a_dirichlet():
    """With weights α_i (1 of an image, their sum A = n + 1): E = Σ α s/A,

    Var = (Σ α s²/A − E²)/(A + 1). The two bounds, 0 and 1, have weight ½ each.
    Bounds: 5 standard deviations of a mean and of a variance of R draws, nearly normal ones.
    """
    scores = np.array([0.0, 0.25, 0.5, 1.0])
    every, weight = np.array([*scores, 0, 1]), np.array([1, 1, 1, 1, 0.5, 0.5])
    mean = (weight @ every) / 5
    variance = ((weight @ every**2) / 5 - mean**2) / 6
    drawn = draws(Bootstrap(4, seed=3), [scores])[:, 0]
    assert abs(drawn.mean() - mean) <= 5 * np.sqrt(variance / RESAMPLES)
    assert abs(drawn.var() / variance - 1) <= 5 * np.sqrt(2 / RESAMPLES)


def test_flips_and_the_difference_of_two_arms_have_the_draws_of_one_table():
    """Counts (both, first alone, second alone, neither) have draws from Dirichlet(counts + a)."""
    counts, imagined = np.array([3, 2, 1, 4]), np.array([1, 3, 3, 1]) / 8
    first, second = np.repeat([[1, 1, 0, 0], [1, 0, 1, 0]], counts, axis=1) * 1.0
    bootstrap = Bootstrap(10, seed=7)
    one, other = bootstrap.seen(first[None]), bootstrap.seen(second[None], arm=2)
    rows = np.concatenate([one * (1 - other), (1 - one) * other, one - other])
    alone, lost, difference = bootstrap.estimate(rows).draws.T
    np.testing.assert_allclose(difference, alone - lost, atol=1e-12)
    for drawn, kind in ((alone, 1), (lost, 2)):
        a = counts[kind] + imagined[kind]
        expected = stats.beta(a, 11 - a)
        # Kolmogorov's bound at 5 in ten million: √(ln(2/5e-7)/2R).
        distance = stats.kstest(drawn, expected.cdf).statistic
        assert distance <= np.sqrt(np.log(2 / 5e-7) / (2 * RESAMPLES))
    (found,) = bootstrap.differences(first[None], second[None])
    assert (found.low, found.high) == pytest.approx(100 * np.percentile(difference, [2.5, 97.5]))
    assert found.mean == pytest.approx(10)


def test_a_paired_difference_is_narrower_than_two_independent_arms():
    """Two arms that share hard images: the interval's width is that of the per-image differences.

    The normal width 2·1.96·sd(a − b)/√n holds for n = 2000; bound: 5 % covers the Monte-Carlo error
    of a 2.5 % quantile, √(.025·.975/R)/φ(1.96)/1.96 = 1.4 % of the half-width, at 3 sd.
    """
    rng = np.random.default_rng(5)
    hard = rng.random(2000)
    first, second = (hard < 0.8).astype(float), (hard + rng.normal(0, 0.05, 2000) < 0.76) * 1.0
    (paired,) = Bootstrap(2000).differences([first], [second])
    half = 100 * 1.96 * (first - second).std() / np.sqrt(2000)
    assert (paired.high - paired.low) / 2 == pytest.approx(half, rel=0.05)
    apart = 100 * 1.96 * np.sqrt((first.var() + second.var()) / 2000)
    assert (paired.high - paired.low) / 2 < 0.6 * apart
    assert paired.mean == pytest.approx(100 * (first.mean() - second.mean()))


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0])
def test_equal_scores_and_differences_leave_room_for_images_that_were_not_drawn(value):
    first = np.full(40, max(value, 0.0))
    bootstrap = Bootstrap(40)
    (found,) = bootstrap.differences([first], [first - value])
    assert found.mean == 100 * value
    assert -100 <= found.low < found.high <= 100 and found.high - found.low > 2
    assert (found.low < 0 < found.high) == (value == 0)
    (between,) = bootstrap.intervals([macro([np.ones(40), np.zeros(40)])])
    assert between.low < 49 and between.high > 51


def test_two_images_none_right_do_not_say_that_none_ever_is():
    none, every = Bootstrap(2).intervals([[0, 0], [1, 1]])
    assert none.low == 0 and 60 < none.high < 75
    assert every.high == 100 and 25 < every.low < 40


def _percentile_bootstrap(scores: np.ndarray) -> list[Interval]:
    """The rule that the package had: resampled means alone; exact, n·mean is binomial."""
    n, right = scores.shape[1], scores.sum(1)
    low, high = (stats.binom.ppf(q, n, right / n) for q in (0.025, 0.975))
    rows = np.nan_to_num([right, low, high]) * 100 / n
    return [Interval(*row, n) for row in rows.T.tolist()]


@pytest.mark.parametrize("n", [5, 50, 500])
def test_intervals_hold_the_accuracy_in_95_of_100_cases(n):
    """Accuracies evenly spread over 0..1: exact up to the interval's own draws.

    The bar is 93 to 97 %. An end's Monte-Carlo error, 5 standard deviations of a share of R draws,
    is 0.8 % of coverage, so the bar is met by more than that. Resampling alone fails it at n = 5.
    """
    assert 0.938 <= coverage.single(n) <= 0.962
    plain = coverage.single(n, _percentile_bootstrap)
    assert plain < (0.80 if n == 5 else 0.95)


def test_no_interval_holds_every_accuracy_alike_but_none_is_far_off():
    """At n = 5 some accuracies are bound to lie in 90 %, others in 99 % (docs/EVALUATION.md)."""
    found = coverage.single_at(5, [0.05, 0.3, 0.5, 0.7, 0.9, 0.95])
    assert 0.89 <= min(found) and max(found) <= 0.996


@pytest.mark.parametrize("n", [5, 50, 500])
def test_paired_columns_hold_the_truth_in_95_of_100_cases(n):
    """Over tables of two arms: every table alike, and arms that agree on most images.

    200 tables: each coverage given a table varies by about 8 %, so 5 standard deviations of the
    mean are 2.8 %, which the bar of 93 to 97 % is widened by. Arms that agree have few images to
    tell them apart, and at n = 5 their intervals are wide, as those of rare events are.
    """
    for prior, most in ((coverage.FLAT, 0.998), (coverage.TOGETHER, 1.0)):
        found = coverage.paired(n, prior)
        assert set(found) == {"difference", "relative", "corrective", "destructive"}
        for name, share in found.items():
            assert 0.902 <= share <= most, name


def test_without_the_imagined_images_differences_of_five_images_fail_the_bar(monkeypatch):
    from roma.evaluate import intervals

    monkeypatch.setattr(intervals, "_IMAGINED", (1e-9,) * 4)
    found = coverage.paired(5, coverage.FLAT)
    assert max(found.values()) < 0.902


@pytest.mark.parametrize("spread", [0.05, 0.7])
def test_macro_averages_hold_the_truth_too(spread):
    """1,000 sets: 5 standard deviations of a share of 95 % are 3.4 %; scores in between vary less
    than right and wrong, so that the imagined images make the interval wider, never narrower.
    """
    assert coverage.averaged(5, spread=spread) >= 0.93 - 0.034
    assert 0.93 - 0.034 <= coverage.averaged(50, spread=spread) <= 1


def test_an_average_over_benchmarks_is_not_pulled_to_the_middle():
    """Seven of 50 images, 90 % right: a pull of ½/51·0.8 on each would be half of the noise.

    500 sets: 5 standard deviations of a share of 95 % are 4.9 %.
    """
    sizes = [50] * 7
    assert 0.93 - 0.049 <= coverage.benchmarks(sizes, 0.9)
    parts = []
    for seed, n in enumerate(sizes):
        bootstrap = Bootstrap(n, seed=seed)
        parts.append(bootstrap.estimate(bootstrap.seen([np.arange(n) < 45] * np.ones((1, 1)))))
    whole = average(parts)
    pooled = stats.beta(7 * 45 + 0.5, 7 * 5 + 0.5)  # all answers as one set
    noise = pooled.std() / np.sqrt(RESAMPLES)
    # The two pulls agree to the first order in 1/n; 0.0004 is twice what is left.
    assert abs(whole.draws.mean() - pooled.mean()) <= 5 * noise + 0.0004
    # (1 + 1/50)/(1 + 1/350) of the pooled width to that order, and 5/√(2R) of simulation.
    assert whole.draws.std() == pytest.approx(1.02 * pooled.std(), rel=0.05)
    assert whole.images == 350 and whole.means == pytest.approx(0.9)


def test_an_average_of_one_is_that_one():
    bootstrap = Bootstrap(7, resamples=50)
    alone = bootstrap.estimate(bootstrap.seen([[1, 0, 1, 1, 0, 0.5, 1]]))
    assert average([alone]).intervals() == alone.intervals()


def test_an_average_that_one_benchmark_decides_keeps_that_ones_shape():
    """Three images all right, and 100,000: the noise, and so the pull, are of the three alone."""
    few, many = Bootstrap(3, resamples=4000), Bootstrap(20_000, resamples=4000, seed=1)
    parts = [
        few.estimate(few.seen(np.ones((1, 3)))),
        many.estimate(many.seen(np.ones((1, 20_000)))),
    ]
    (found,) = average(parts).intervals()
    half = 50 + 100 * stats.beta(3.5, 0.5).ppf(0.025) / 2
    assert found.high == 100 and found.low == pytest.approx(half, abs=1.5)


def test_a_quotient_of_a_mean_that_is_zero_is_zero():
    bootstrap = Bootstrap(4, resamples=200)
    top, bottom = (
        bootstrap.estimate(bootstrap.seen(rows))
        for rows in ([[1, 0, 0, 0]] * 2, [[1, 1, 0, 0], [0] * 4])
    )
    half, none = top.over(bottom).intervals()
    assert half.mean == 50 and half.low <= 50 <= half.high
    assert none.mean == 0


def test_weights_that_are_made_anew_are_those_that_are_kept(monkeypatch):
    from roma.evaluate import intervals

    scores = np.random.default_rng(0).integers(0, 2, (3, 57)) * 1.0
    kept = Bootstrap(57, seed=4, resamples=1200)
    monkeypatch.setattr(intervals, "_HELD", 0)
    anew = Bootstrap(57, seed=4, resamples=1200)
    assert kept._kept is not None and anew._kept is None
    assert (draws(kept, scores) == draws(anew, scores)).all()
    assert draws(kept, scores).shape == (1200, 3)
    assert (draws(kept, scores) != draws(Bootstrap(57, seed=5, resamples=1200), scores)).any()


def test_scores_outside_0_to_1_are_refused():
    with pytest.raises(ValueError, match=r"scores: expected values from 0 to 1, got -1 to 0; give"):
        Bootstrap(2).intervals([[0, -1]])
    with pytest.raises(ValueError, match=r"scores: expected values from 0 to 1, got 0 to 2"):
        Bootstrap(2).differences([[2, 0]], [[0, 0]])


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


def test_scores_that_are_no_number_are_refused():
    with pytest.raises(ValueError, match="scores: expected values from 0 to 1, got nan to nan"):
        Bootstrap(2).intervals([[1, np.nan]])


def test_an_average_keeps_to_what_is_possible():
    """Seven of five images, of one of which one is wrong: freed of the pull, draws leave 0..1."""
    parts = []
    for seed in range(7):
        bootstrap = Bootstrap(5, seed=seed, resamples=2000)
        parts.append(bootstrap.estimate(bootstrap.seen([[seed > 0, 1, 1, 1, 1]])))
    whole = average(parts)
    (found,) = whole.intervals()
    assert np.percentile(whole.draws, 97.5) > 1 and found.high == 100 and found.low > 80


def test_of_equal_benchmarks_an_average_spreads_as_its_formula_says():
    """Every ω is 1/B: a deviation counts (1 − 1/B)(1 + 1/n) + 1/B, at n = 5 and B = 7 by 1.17.

    Bound: 5/√(2R) of simulation.
    """
    parts = []
    for seed in range(7):
        bootstrap = Bootstrap(5, seed=seed)
        parts.append(bootstrap.estimate(bootstrap.seen([[1, 1, 1, 0, 0]])))
    alone = np.sqrt(np.mean([each.draws.var() for each in parts]) / 7)
    expected = alone * (6 / 7 * (1 + 1 / 5) + 1 / 7)
    assert average(parts).draws.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * RESAMPLES))


def test_the_draws_of_a_quotient_are_those_of_its_parts():
    """Of one right answer below, but for the rare draws that give it less than a tenth."""
    bootstrap = Bootstrap(20)
    rows = np.arange(20) < [[3], [1]]
    top, bottom = (bootstrap.estimate(bootstrap.seen(row[None])) for row in rows)
    plain = bottom.draws > 0.1 / 20
    assert 0.9 < plain.mean() < 1
    found = top.over(bottom).draws
    np.testing.assert_allclose(found[plain], (top.draws / bottom.draws)[plain])
    assert found.max() <= 1 / (0.1 / 20)


def test_no_draw_comes_twice_in_many_blocks():
    found = draws(Bootstrap(500, resamples=5000), [np.arange(500) < 250])  # in three blocks
    assert len(np.unique(found)) > 4990  # float32 weights: two may agree by chance


def test_each_statistic_of_an_average_has_a_pull_of_its_own():
    """In the first the noise is that of the five images, in the second that of the fifty."""
    rows = {5: [[1, 0, 1, 0, 1], [1] * 5], 50: [[1] * 50, [1, 0] * 25]}
    parts = []
    for seed, (n, scores) in enumerate(rows.items()):
        bootstrap = Bootstrap(n, seed=seed, resamples=500)
        parts.append(bootstrap.estimate(bootstrap.seen(scores)))
    whole = average(parts)
    for turn in range(2):
        np.testing.assert_allclose(
            whole.draws[:, [turn]], average([each[[turn]] for each in parts]).draws
        )
