"""The tables of a summary and of a suite, drawn in 80 columns."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from roma.evaluate.columns import columns_of
from roma.evaluate.conditions import Cell, cells_of
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import summarise, summarise_suite
from roma.evaluate.tables import suite_table, summary_table


def shown(table) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    return text


def made(n, seed=0, *, right=0.8, levels=(1, 2, 3), pools=("clean", "seen", "unseen"), answers=1):
    generator = np.random.default_rng(seed)
    cells = {}
    for cell in cells_of(pools, levels):
        share = (generator.random((answers, n)) < right).mean(0)
        more = [(share > 0) * 1, (share > 0.5) * 1] if answers > 1 else [None, None]
        cells[cell] = CellResult(share, [], *more)
    return EvalResult([str(i) for i in range(n)], cells)


@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("levels", [(1,), (1, 2, 3, 4, 5)])
def test_the_summary_compares_every_pool_and_level_with_clean_images(right, levels):
    summary = summarise(made(30, right=right, levels=levels))
    text = shown(summary_table(summary))
    head, _, below = text.partition("Against clean images")
    assert "clean: " in head and "unseen: mean" in head
    for name, entries in columns_of(summary["robustness"]).items():
        line = next(line for line in below.splitlines() if line.strip().startswith(name + " "))
        numbers = re.findall(r"−?\d+\.\d|–", line)
        means = [f"{e['mean']:.1f}".replace("-", "−") if e else "–" for e in entries.values()]
        assert numbers[1:] == means


def test_without_clean_images_there_is_no_comparison_with_them():
    assert "Against" not in shown(summary_table(summarise(made(9, pools=("seen",)))))
    assert "corruption" not in shown(summary_table(summarise(made(9, pools=("clean",)))))


def test_several_answers_have_a_table_of_their_own():
    summary = summarise(made(30, answers=3))
    text = shown(summary_table(summary)).partition("Several answers")[2]
    assert "pass" in text and "majority" in text
    assert f"{summary['several']['clean']['pass']['mean']:.1f}" in text
    assert "Several" not in shown(summary_table(summarise(made(30))))


def test_corruptions_that_lack_a_level_leave_a_dash():
    cells = {Cell(): [1, 0], Cell("p", "a", 1): [1, 1], Cell("p", "b", 2): [0, 1]}
    rows = {cell: CellResult(np.array(row, float), []) for cell, row in cells.items()}
    text = shown(summary_table(summarise(EvalResult(["0", "1"], rows))))
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["b"]]
    assert line.split()[1] == "–"


@pytest.mark.parametrize("levels", [(1, 2, 3), (1, 2, 3, 4, 5)])
def test_a_suite_has_a_row_for_each_benchmark_and_the_average(levels):
    names = ["mathvista_testmini_cot_reasoning", "mmstar", "ai2d"]
    suite = summarise_suite({n: made(9 + i, i, levels=levels) for i, n in enumerate(names)})
    text = shown(suite_table(suite))
    head, _, below = text.partition("Against clean images")
    assert head.startswith("Accuracy, % (95 % interval), 30 images")
    for name, part in (*suite["benchmarks"].items(), ("average", suite["average"])):
        rows = [line for line in head.splitlines() if line.strip().startswith(name[:19])]
        numbers = [number for row in rows for number in re.findall(r"\d+\.\d", row)]
        assert numbers == [f"{entry['mean']:.1f}" for entry in columns_of(part["pools"]).values()]
    assert "mathvista_testmini_ " in head and "\n cot_reasoning " in head  # no word is broken
    drop = suite["average"]["robustness"]["unseen"]["L3"]["drop"]["mean"]
    assert f"{drop:.1f}".replace("-", "−") in below


def test_a_suite_of_one_benchmark_shows_that_ones_robustness():
    suite = summarise_suite({"mmstar": made(9)})
    text = shown(suite_table(suite))
    assert "average" not in text and "Against clean images" in text
