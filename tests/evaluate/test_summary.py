"""The columns of a summary, by hand and by their identities."""

import json
import tracemalloc

import numpy as np
import pytest

from roma.evaluate.conditions import Cell, cells_of
from roma.evaluate.intervals import Bootstrap
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import ROBUSTNESS, average_of, measure, summarise, summarise_suite

BLUR, NOISE = Cell("seen", "gaussian_blur", 3), Cell("seen", "gaussian_noise", 3)


def result_of(correct: dict[Cell, list], *, several: bool = False) -> EvalResult:
    """A result with these answers; of several, pass and majority are made up from the share."""
    cells = {}
    for cell, row in correct.items():
        share = np.array(row, dtype=float)
        more = [(share > 0) * 1, (share > 0.5) * 1] if several else [None, None]
        cells[cell] = CellResult(share, [], *more)
    count = len(next(iter(correct.values())))
    return EvalResult([str(i) for i in range(count)], cells)


def drawn(n: int, seed: int, cells=None) -> EvalResult:
    generator = np.random.default_rng(seed)
    cells = cells or cells_of(["clean", "seen", "unseen"], [1, 3])
    return result_of({c: generator.random(n) < 0.9 - 0.1 * c.level for c in cells})


def test_every_column_of_ten_questions_by_hand():
    """Of 10 clean answers 8 are right; blurred, 2 of those turn wrong and 1 wrong one right."""
    clean = [1] * 8 + [0, 0]
    blurred = [1] * 6 + [0, 0] + [1, 0]
    summary = summarise(result_of({Cell(): clean, BLUR: blurred}))
    assert summary["images"] == 10
    assert summary["pools"]["clean"]["mean"] == 80
    assert summary["pools"]["seen"]["L3"]["mean"] == 70
    found = {name: entry["mean"] for name, entry in summary["robustness"]["seen"]["L3"].items()}
    assert found == {"drop": 10, "relative": 87.5, "corrective": 10, "destructive": 20}
    row = summary["detail"][1]
    assert (row["pool"], row["corruption"], row["level"]) == ("seen", "gaussian_blur", 3)
    assert (row["mean"], row["relative"]["mean"], row["n"]) == (70, 87.5, 10)
    assert set(summary["detail"][0]) == {"pool", "corruption", "level", "mean", "low", "high", "n"}


def test_a_pool_is_the_mean_over_its_corruptions_in_every_column():
    clean, blurred, noisy = [1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]
    summary = summarise(result_of({Cell(): clean, BLUR: blurred, NOISE: noisy}))
    found = {name: entry["mean"] for name, entry in summary["robustness"]["seen"]["L3"].items()}
    # By hand: blur is right 2, loses 2, gains 1; noise is right 2, loses 1, gains 0; of 4.
    assert found == {
        "drop": 25,
        "relative": pytest.approx(100 * 2 / 3, abs=1e-3),
        "corrective": 12.5,
        "destructive": 37.5,
    }


def test_with_shares_of_right_answers_flips_are_products_and_the_drop_their_difference():
    clean, noisy = np.array([0.75, 0.5, 1.0]), np.array([0.25, 0.5, 0.0])
    summary = summarise(result_of({Cell(): clean, NOISE: noisy}, several=True))
    found = {name: entry["mean"] for name, entry in summary["robustness"]["seen"]["L3"].items()}
    assert found["corrective"] == pytest.approx(100 * ((1 - clean) * noisy).mean(), abs=1e-3)
    assert found["destructive"] == pytest.approx(100 * (clean * (1 - noisy)).mean(), abs=1e-3)
    assert found["drop"] == pytest.approx(found["destructive"] - found["corrective"], abs=2e-3)
    several = {name: e["mean"] for name, e in summary["several"]["seen"]["L3"].items()}
    assert several == {"pass": pytest.approx(66.667), "majority": 0}
    assert summary["several"]["clean"]["pass"]["mean"] == 100
    assert {"pass", "majority", *ROBUSTNESS} <= set(summary["detail"][1])
    assert "drop" not in summary["detail"][0] and "pass" in summary["detail"][0]


def test_without_a_clean_condition_nothing_is_compared_with_it():
    summary = summarise(result_of({BLUR: [1, 0]}))
    assert set(summary) == {"images", "pools", "detail"}
    assert not set(ROBUSTNESS) & set(summary["detail"][0])
    clean = summarise(result_of({Cell(): [1, 0]}))
    assert set(clean) == {"images", "pools", "detail"}


def test_relative_robustness_without_a_right_clean_answer_is_null():
    summary = summarise(result_of({Cell(): [0, 0, 0], BLUR: [1, 0, 0]}))
    entries = summary["robustness"]["seen"]["L3"]
    assert entries["relative"] is None and summary["detail"][1]["relative"] is None
    assert entries["drop"]["mean"] == pytest.approx(-33.333)
    json.dumps(summary, allow_nan=False)


def test_every_interval_holds_its_mean_and_keeps_to_what_is_possible():
    for n, seed in ((1, 0), (2, 1), (40, 2)):
        summary = summarise(drawn(n, seed))
        for row in summary["detail"]:
            entries = {"accuracy": row} | {k: v for k, v in row.items() if k in ROBUSTNESS}
            for name, entry in entries.items():
                if entry is None:
                    assert name == "relative"
                    continue
                assert entry["low"] <= entry["mean"] <= entry["high"], name
                assert entry["low"] < entry["high"], name
                assert entry["low"] >= (-100 if name == "drop" else 0), name
                assert entry["high"] <= (np.inf if name == "relative" else 100), name


def test_the_interval_of_a_drop_is_that_of_the_paired_difference():
    result = drawn(60, 3, [Cell(), BLUR])
    bootstrap = Bootstrap(60, seed=5)
    entry = summarise(result, bootstrap=bootstrap)["robustness"]["seen"]["L3"]["drop"]
    rows = [[result.cells[cell].correct] for cell in (Cell(), BLUR)]
    (found,) = bootstrap.differences(*rows)
    assert entry == found.as_dict()


def test_several_benchmarks_have_a_macro_average_in_every_column():
    suite = {"few": drawn(5, 0), "many": drawn(200, 1), "some": drawn(50, 2)}
    found = summarise_suite(suite)
    assert list(found["benchmarks"]) == ["few", "many", "some"]
    assert found["benchmarks"]["few"] == summarise(suite["few"])
    assert found["average"]["images"] == 255
    for get in (
        lambda s: s["pools"]["clean"],
        lambda s: s["pools"]["unseen"]["L3"],
        lambda s: s["robustness"]["seen"]["L1"]["drop"],
        lambda s: s["robustness"]["seen"]["L1"]["destructive"],
        lambda s: s["detail"][4],
    ):
        parts = [get(each)["mean"] for each in found["benchmarks"].values()]
        assert get(found["average"])["mean"] == pytest.approx(np.mean(parts), abs=2e-3)
    whole = found["average"]
    ratio = whole["pools"]["seen"]["L3"]["mean"] / whole["pools"]["clean"]["mean"]
    relative = whole["robustness"]["seen"]["L3"]["relative"]
    assert relative["mean"] == pytest.approx(100 * ratio, abs=0.01)
    assert relative["low"] < relative["mean"] < relative["high"]


def test_one_benchmark_has_no_average_and_none_is_refused():
    assert set(summarise_suite({"one": drawn(5, 0)})) == {"benchmarks"}
    with pytest.raises(ValueError, match="benchmarks: expected at least one, got none"):
        summarise_suite({})


def test_an_average_is_over_the_conditions_that_all_have():
    both, clean = drawn(9, 0, [Cell(), BLUR]), drawn(9, 1, [Cell()])
    found = summarise_suite({"a": both, "b": clean})
    assert list(found["average"]["pools"]) == ["clean"]
    assert "average" not in summarise_suite({"a": drawn(9, 0, [BLUR]), "b": clean})


def test_two_benchmarks_of_one_size_are_independent():
    """Equal answers on both: the average of two is √2 narrower, as no shared draws would make it.

    Bound: 5 % is five times the simulation's error of a width, 1/√(2R) of each.
    """
    result = result_of({Cell(): [1, 0] * 100})
    parts = [measure(result, Bootstrap(200, seed=seed)) for seed in (0, 1)]
    whole = average_of(parts)
    widths = [each.estimates["accuracy"].draws[:, 0].std() for each in (*parts, whole)]
    assert widths[2] * np.sqrt(2) == pytest.approx(np.mean(widths[:2]), rel=0.05)


def test_memory_does_not_grow_with_draws_times_images():
    """10,000 draws of 4,000 images are 320 MB in float64; the summary holds a block at a time."""
    result = drawn(4000, 0, [Cell(), BLUR])
    tracemalloc.start()
    summarise(result)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80e6


def test_an_average_takes_each_condition_from_where_a_benchmark_has_it():
    """Others stand before it, and in another order."""
    far = Cell("unseen", "motion_blur", 1)
    one = result_of({far: [0, 0], BLUR: [1, 1], Cell(): [1, 0]})
    other = result_of({Cell(): [0, 0], Cell("masking", "patch_mask", 1): [1, 1], BLUR: [0, 0]})
    found = summarise_suite({"a": one, "b": other})["average"]
    assert found["pools"]["clean"]["mean"] == 25 and set(found["pools"]) == {"clean", "seen"}
    assert found["pools"]["seen"]["L3"]["mean"] == 50
    means = {(row["corruption"], row["level"]): row["mean"] for row in found["detail"]}
    assert means == {("gaussian_blur", 3): 50, (None, 0): 25}
