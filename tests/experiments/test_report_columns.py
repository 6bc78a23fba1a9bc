"""What a report compares: a level inside the range of training and one beyond, over seeds too."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.report import plots
from experiments.report.columns import compared, compared_in, range_of_training
from experiments.report.hierarchy import Hierarchy
from experiments.report.page import render_page
from experiments.report.report import RESAMPLES, build_report, summary
from experiments.report.rows import FIELDS, csv_of, rows_of
from experiments.report.terminal import print_report
from roma.evaluate.columns import columns_of
from roma.evaluate.conditions import cells_of
from roma.evaluate.intervals import Bootstrap
from roma.evaluate.result import CellResult, EvalResult

IMAGES, SEEDS = 40, (3, 11)
SHARES = {"base": 0.5, "grpo": 0.6, "naive_mild": 0.55, "naive": 0.6, "roma": 0.8}
TOOK = {3: 7.5, 11: 9.0}
"""CPU seconds of an arm's run with a seed."""


def made_up() -> dict[str, dict[int, EvalResult]]:
    """Right answers by chance, of five arms."""
    rng, cells = np.random.default_rng(5), cells_of(["clean", "seen", "unseen"], [1, 2, 3, 4])
    return {
        arm: {
            seed: EvalResult(
                [str(i) for i in range(IMAGES)],
                {
                    cell: CellResult((rng.random(IMAGES) < share).astype(np.uint8), [""] * IMAGES)
                    for cell in cells
                },
            )
            for seed in (SEEDS[:1] if arm == "base" else SEEDS)
        }
        for arm, share in SHARES.items()
    }


@pytest.fixture(scope="module")
def results() -> dict[str, dict[int, EvalResult]]:
    return made_up()


@pytest.fixture(scope="module")
def report(results: dict[str, dict[int, EvalResult]]) -> dict:
    # As they end: not in the order of their seeds, which are no numbers of one digit each.
    runs = {
        f"{arm}-seed{seed}": {"steps": 100 + seed, "train_cpu_s": TOOK[seed]}
        for seed in reversed(SEEDS)
        for arm in SHARES
    }
    runs["base-seed3"] = {"steps": 0, "train_cpu_s": 0.0}
    del runs["base-seed11"]
    return build_report(results, config={}, versions={}, timings={"runs": runs}, trained_to=3.5)


def test_columns_inside_and_beyond() -> None:
    levels = {f"L{level}": {} for level in (1, 2, 10)}
    tree = {"clean": {"mean": 1.0}, "seen": levels, "unseen": {"L1": {}}}
    assert compared(tree) == (["clean", "seen L10", "unseen L1"], [])
    assert compared(tree, 2) == (["clean", "seen L2", "unseen L1"], ["seen L10"])
    assert compared(tree, 0.5) == (["clean"], ["seen L10", "unseen L1"])
    assert compared(tree, 10) == compared(tree)


@pytest.mark.parametrize(
    ("trained_to", "said"),
    [
        (3.5, "up to level 3.5: L1, L2 and L3 lie inside this range, L4 beyond it."),
        (1, "up to level 1: L1 lies inside this range, L2, L3 and L4 beyond it."),
        (5, "up to level 5: L1, L2, L3 and L4 lie inside this range."),
        (None, ""),
    ],
)
def test_the_range_in_words(report: dict, trained_to: float | None, said: str) -> None:
    assert range_of_training(report | {"trained_to": trained_to}).endswith(said)
    assert bool(said) == ("inside this range" in summary(report | {"trained_to": trained_to})[0])


def test_terminal_page_and_findings_show_a_level_inside_and_one_beyond(report: dict) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_report(report, console)
    text = console.export_text()
    inside, beyond = text.split("up to training's level 3.5")[1].split(
        "beyond training's level 3.5"
    )
    assert re.search(r"clean +seen L3 +unseen L3", inside) and "L4" not in inside
    assert re.search(r"seen L4 +unseen L4", beyond.partition("ROMA")[0])
    assert max(map(len, text.splitlines())) <= 80
    finding = summary(report)[1].replace("\u00a0", " ")
    named = re.findall(r"(clean|(?:un)?seen L\d) [+−]", finding)
    assert named == ["clean", "seen L3", "unseen L3", "seen L4", "unseen L4"]
    figures = dict.fromkeys(("robustness", "methods", "corruptions", "learning_curves"), b"")
    page = render_page(report, summary(report), figures, [])
    assert page.count("L1, L2 and L3 lie inside this range, L4 beyond it") == 2
    assert "in a mean over seeds, of training seeds" in page and "mild views" in page


def test_the_figures_mark_the_range_of_training(report: dict) -> None:
    for panel in plots.robustness(report).axes:
        (edge,) = (line for line in panel.lines if line.get_linestyle() == ":" and
                   list(line.get_xdata()) == [3.5, 3.5])  # fmt: skip
        assert edge.get_ydata()[1] == 1  # from the panel's bottom to its top
        assert [text.get_text() for text in panel.texts] == [
            "training: seen corruptions up to level 3.5 "
        ]
    without = plots.robustness(report | {"trained_to": None})
    assert not any(panel.texts or panel.patches for panel in without.axes)
    titles = [panel.get_title(loc="left") for panel in plots.corruptions(report).axes]
    assert titles[:2] == [f"Accuracy at L{level}, %, mean over seeds" for level in (3, 4)]
    titles = [panel.get_title(loc="left") for panel in plots.methods(report).axes]
    assert titles == ["clean", "seen L3", "unseen L3", "seen L4", "unseen L4"]


def test_a_mean_covers_seeds_and_images_and_a_seed_images_alone(
    report: dict, results: dict[str, dict[int, EvalResult]]
) -> None:
    columns = results["roma"][3].columns

    def scores(arm: str) -> np.ndarray:
        return np.array([[results[arm][s].scores(*c) for c in columns] for s in SEEDS])

    draws, images = Hierarchy(IMAGES, resamples=RESAMPLES), Bootstrap(IMAGES, resamples=RESAMPLES)
    mean = draws.differences(scores("roma"), scores("grpo"))
    alone = images.differences(scores("roma")[1], scores("grpo")[1])
    found = report["differences"]["roma-grpo"]
    assert list(columns_of(found["mean"]).values()) == [each.as_dict() for each in mean]
    assert list(columns_of(found["11"]).values()) == [each.as_dict() for each in alone]
    accuracy = draws.intervals(scores("naive"))
    assert list(columns_of(report["arms"]["naive"]).values()) == [e.as_dict() for e in accuracy]
    cells = results["roma"][3].cells
    single = np.array([[results["roma"][s].cells[c].correct for c in cells] for s in SEEDS])
    detail = [row for row in report["detail"] if (row["arm"], row["seed"]) == ("roma", "mean")]
    for row, interval in zip(detail, draws.intervals(single), strict=True):
        assert {key: row[key] for key in ("mean", "low", "high", "n")} == interval.as_dict()


def test_one_seed_claims_nothing_of_seeds(results: dict[str, dict[int, EvalResult]]) -> None:
    alone = {arm: {3: by_seed[3]} for arm, by_seed in results.items() if arm in ("grpo", "roma")}
    report = build_report(alone, config={}, versions={}, timings={})
    assert report["intervals"]["covers"].endswith("not the choice of training seeds")
    assert "do not cover the choice of the training seed" in summary(report)[-1]
    assert report["trained_to"] is None and compared_in(report)[1] == []


def test_every_number_stands_once_in_the_rows(report: dict, tmp_path: Path) -> None:
    rows = rows_of(report)
    assert all(tuple(row) == FIELDS for row in rows)
    keys = [tuple(row[name] for name in FIELDS[:5]) for row in rows]
    assert len(set(keys)) == len(keys)
    at = {key: (row["mean"], row["low"], row["high"]) for key, row in zip(keys, rows, strict=True)}
    entry = report["arms"]["roma"]["seen"]["L4"]
    assert at["accuracy", "roma", "", "mean", "seen L4"] == (
        entry["mean"],
        entry["low"],
        entry["high"],
    )
    entry = report["differences"]["naive-naive_mild"]["11"]["clean"]
    assert at["difference", "naive", "naive_mild", "11", "clean"] == (
        entry["mean"],
        entry["low"],
        entry["high"],
    )
    assert at["cost", "roma", "", "mean", "steps"] == (107, 103, 111)
    assert at["cost", "roma", "", "mean", "cpu_s"] == (8.25, 7.5, 9.0)
    for seed, took in TOOK.items():
        assert at["cost", "grpo", "", str(seed), "cpu_s"] == (took, took, took)
    assert report["costs"]["grpo"] == {"steps": [103, 111], "cpu_s": [7.5, 9.0]}  # by seed
    assert not any(key[:2] == ("cost", "base") for key in keys)
    pairs, columns = len(report["differences"]), 1 + 2 * 4
    assert len(rows) == columns * (2 + 4 * 3 + pairs * 3) + 4 * 2 * 3
    path = tmp_path / "report.csv"
    path.write_text(csv_of(report), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [list(row.values()) for row in read] == [list(map(str, r.values())) for r in rows]
    assert csv_of(report).splitlines()[0] == "kind,arm,against,seed,column,mean,low,high"
