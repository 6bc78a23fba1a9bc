"""Two models on the same images: `compare`, `roma eval --compare`, and what they refuse."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from support.result_folders import BLUR, CLEAN, write_bench, write_eval

from roma import cli
from roma.evaluate.compare import compare, run_compare
from roma.evaluate.conditions import Cell, cells_of
from roma.evaluate.folders import Results
from roma.evaluate.intervals import Bootstrap
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.tables import comparison_table


def results_of(name, answers, ids=None, **settings) -> Results:
    """Results with these answers: benchmark → cell → shares of right answers."""
    found = {}
    for benchmark, cells in answers.items():
        rows = {cell: CellResult(np.array(row, float), []) for cell, row in cells.items()}
        count = len(next(iter(cells.values())))
        found[benchmark] = EvalResult(ids or [str(i) for i in range(count)], rows)
    return Results(name, settings, found)


def test_differences_of_accuracy_and_drop_by_hand():
    one = results_of("a", {"d": {CLEAN: [1, 1, 1, 0], BLUR: [1, 1, 0, 0]}})
    other = results_of("b", {"d": {CLEAN: [1, 1, 0, 0], BLUR: [0, 0, 0, 0]}})
    found = compare(one, other)
    assert (found["first"], found["second"]) == ("a", "b")
    part = found["benchmarks"]["d"]
    assert part["images"] == 4
    assert part["pools"]["clean"]["mean"] == 25 and part["pools"]["seen"]["L1"]["mean"] == 50
    assert part["robustness"]["seen"]["L1"]["drop"]["mean"] == 25 - 50  # drops of 25 and 50
    assert part["detail"][1]["mean"] == 50 and part["detail"][1]["drop"]["mean"] == -25
    assert found["left_out"] == found["differing"] == [] and "average" not in found
    console = Console(record=True, file=io.StringIO())
    console.print(comparison_table(found))
    assert console.export_text().count("*") == 1  # in the heading: every interval has a 0
    rows = [[each.benchmarks["d"].cells[BLUR].correct] for each in (one, other)]
    (entry,) = Bootstrap(4).differences(*rows)
    assert part["pools"]["seen"]["L1"] == entry.as_dict()


def test_the_difference_of_a_model_and_itself_is_zero_within_its_interval():
    generator = np.random.default_rng(0)
    answers = {"d": {cell: generator.random(50) < 0.7 for cell in (CLEAN, BLUR)}}
    part = compare(results_of("a", answers), results_of("b", answers))["benchmarks"]["d"]
    drop = part["robustness"]["seen"]["L1"]["drop"]
    for entry in (part["pools"]["clean"], part["pools"]["seen"]["L1"], drop):
        assert entry["mean"] == 0 and -12 < entry["low"] < 0 < entry["high"] < 12


def test_questions_in_another_order_are_matched_by_their_ids():
    one = results_of("a", {"d": {CLEAN: [1, 0, 0]}}, ids=["x", "y", "z"])
    other = results_of("b", {"d": {CLEAN: [0, 0, 1]}}, ids=["z", "y", "x"])
    entry = compare(one, other)["benchmarks"]["d"]["pools"]["clean"]
    same = compare(one, one)["benchmarks"]["d"]["pools"]["clean"]
    assert entry == same


def test_what_one_alone_has_is_named_and_left_out():
    noise = Cell("seen", "gaussian_noise", 1)
    one = results_of("a", {"d": {CLEAN: [1, 0], BLUR: [1, 0], noise: [1, 0]}, "e": {CLEAN: [1]}})
    other = results_of("b", {"d": {CLEAN: [1, 0], BLUR: [0, 0]}, "f": {CLEAN: [1]}})
    found = compare(one, other)
    assert found["left_out"] == [
        "e: a alone has it",
        "f: b alone has it",
        "d, gaussian_noise L1: a alone has it",
    ]
    for part in (found["benchmarks"]["d"], compare(other, one)["benchmarks"]["d"]):
        # The mean over the pool's corruptions would be another mean in each.
        assert list(part["pools"]) == ["clean"] and len(part["detail"]) == 2


def test_pass_and_majority_are_compared_where_both_have_as_many_answers():
    def several(name, share, answers):
        row = CellResult(
            np.array(share), [], (np.array(share) > 0) * 1, (np.array(share) > 0.5) * 1
        )
        return Results(name, {"answers": answers}, {"d": EvalResult(["0", "1"], {CLEAN: row})})

    one, other = several("a", [0.5, 1.0], 2), several("b", [0.0, 0.5], 2)
    part = compare(one, other)["benchmarks"]["d"]
    found = {name: entry["mean"] for name, entry in part["several"]["clean"].items()}
    assert found == {"pass": 50, "majority": 50}
    turned = several("b", [0.5, 0.0], 2)
    turned.benchmarks["d"].ids.reverse()
    assert compare(one, turned)["benchmarks"]["d"] == part
    found = compare(one, several("c", [0.0, 0.5], 4))
    assert "several" not in found["benchmarks"]["d"]
    assert found["differing"] == ["answers 2 in a, 4 in c"]


def test_several_benchmarks_have_an_average():
    cells = cells_of(["clean", "seen"], [1])
    generator = np.random.default_rng(0)
    sizes = {"few": 6, "many": 60}
    one, other = (
        results_of(name, {b: {c: generator.random(n) < p for c in cells} for b, n in sizes.items()})
        for name, p in (("a", 0.9), ("b", 0.5))
    )
    found = compare(one, other)
    for get in (
        lambda s: s["pools"]["seen"]["L1"],
        lambda s: s["robustness"]["seen"]["L1"]["drop"],
    ):
        parts = [get(found["benchmarks"][name])["mean"] for name in sizes]
        assert get(found["average"])["mean"] == pytest.approx(np.mean(parts), abs=2e-3)


def test_benchmarks_of_one_size_are_compared_with_draws_of_their_own():
    """Equal answers on both: the average is √2 narrower, as no shared draws would make it.

    Bound: 5 % is five times the simulation's error of a width, 1/√(2R) of each.
    """
    answers = {name: {CLEAN: [1, 0] * 100} for name in "de"}
    others = {name: {CLEAN: [1, 1, 0, 0] * 50} for name in "de"}
    found = compare(results_of("a", answers), results_of("b", others))
    entries = [found["average"], *found["benchmarks"].values()]
    whole, *parts = (
        each["pools"]["clean"]["high"] - each["pools"]["clean"]["low"] for each in entries
    )
    assert whole * np.sqrt(2) == pytest.approx(np.mean(parts), rel=0.05)


JPEG = {
    **{"pool": "seen", "corruption": "jpeg", "level": 1},
    **{"parameter": 5, "reference_size": 224},
}


@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        ({"e": {CLEAN: [1, 0]}}, {}, "a benchmark that both have, got d in a and e in b"),
        ({"d": {CLEAN: [1]}}, {}, "questions of d: .*2 and 1, of which 1 in one alone: '1' in a"),
        ({"d": {CLEAN: [1, 0, 1]}}, {}, "2 and 3, of which 1 in one alone: '2' in b"),
        ({"d": {BLUR: [1, 0]}}, {}, "a condition that both have, got clean and gaussian_blur L1"),
        ({"d": {CLEAN: [1, 0]}}, {"seed": 1}, "seed of the noise: .*got 0 in a and 1 in b"),
        (
            {"d": {CLEAN: [1, 0]}},
            {"data_fingerprint": "x"},
            "questions of d in b: expected those of a, got others under the same ids",
        ),
        (
            {"d": {CLEAN: [1, 0]}},
            {"cells": [{"pool": "seen", "corruption": "jpeg", "level": 1, "parameter": 7}]},
            "level table: expected the same, got 5 in a and 7 in b for jpeg L1, parameter",
        ),
        (
            {"d": {CLEAN: [1, 0]}},
            {"cells": [JPEG | {"reference_size": 448}]},
            "level table: .*got 224 in a and 448 in b for jpeg L1, reference_size",
        ),
    ],
)
def test_results_that_do_not_compare_are_refused(other, settings, message):
    told = {"seed": 0, "data_fingerprint": "y", "cells": [JPEG]}
    one = results_of("a", {"d": {CLEAN: [1, 0]}}, **told)
    with pytest.raises(ValueError, match=message) as error:
        compare(one, results_of("b", other, **(told | settings)))
    assert "\n" not in str(error.value)


def test_a_dataset_in_another_order_is_refused_as_that():
    one, other = (
        results_of(name, {"d": {CLEAN: [1, 0]}}, ids=ids, data_fingerprint=name)
        for name, ids in (("a", ["0", "1"]), ("b", ["1", "0"]))
    )
    with pytest.raises(ValueError, match="those of a, got the same ids in another order"):
        compare(one, other)


def test_other_questions_of_a_benchmark_of_lmms_eval_are_refused():
    one, other = (
        results_of(name, {"d": {CLEAN: [1]}}, benchmarks={"d": {"fingerprint": name}})
        for name in "ab"
    )
    with pytest.raises(ValueError, match="got others under the same ids"):
        compare(one, other)


def test_the_command_prints_a_table_and_keeps_json(tmp_path, capsys):
    one = write_eval(tmp_path / "a", right={CLEAN: [1] * 20, BLUR: [1] * 20})
    asked = {"max_new_tokens": 5}
    two = write_eval(tmp_path / "b", right={CLEAN: [1] * 20, BLUR: [0] * 20}, settings=asked)
    out = tmp_path / "kept" / "difference.json"
    assert cli.main(["eval", "--compare", str(one), str(two), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "a minus b: points" in said and "digits@test, 20 images" in said
    (line,) = [line for line in said.splitlines() if "seen L1" in line]
    assert "+100.0 [" in line and line.count("*") == 2 and "−100.0 [" in line
    assert "asked differently: max new tokens not set in a, 5 in b" in said
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["benchmarks"]["digits@test"]["pools"]["seen"]["L1"]["mean"] == 100


def test_folders_of_one_name_go_by_their_paths(tmp_path):
    folders = [write_eval(tmp_path / where / "model") for where in "ab"]
    console = Console(width=80, file=io.StringIO())
    found = run_compare(*folders, console=console)
    assert (found["first"], found["second"]) == tuple(map(str, folders))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "DATA"], "--compare: expected no more than --out beside it, got MODEL, DATA"),
        (["--limit", "3", "--overwrite"], "got --limit, --overwrite; leave them out"),
        (["--out", "folder"], "--out: expected a .json file with --compare, got folder"),
    ],
)
def test_what_does_not_apply_to_a_comparison_is_refused(tmp_path, capsys, words, message):
    folders = [str(write_eval(tmp_path / name)) for name in "ab"]
    assert cli.main(["eval", *words, "--compare", *folders]) == 2
    said = capsys.readouterr().err
    assert message in said.replace("--overwrite, --limit", "--limit, --overwrite")
    assert said.count("\n") == 1


def test_without_a_comparison_the_model_and_the_data_are_still_needed(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["eval", "model"])
    assert error.value.code == 2 and "required: DATA" in capsys.readouterr().err


def test_a_folder_of_each_command_is_compared_in_80_columns(tmp_path, capsys):
    folders = [str(write_bench(tmp_path / name)) for name in ("first", "second")]
    assert cli.main(["eval", "--compare", *folders]) == 0
    assert "average, 7 images" in capsys.readouterr().out
    mixed = write_eval(tmp_path / "eval")
    assert cli.main(["eval", "--compare", folders[0], str(mixed)]) == 2
    assert "got mmstar, ai2d in first and digits@test in eval" in capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_the_table_shows_every_difference_in_80_columns(several):
    cells = cells_of(["clean", "seen", "unseen"], [1, 2, 3])
    generator = np.random.default_rng(0)

    def made(name, share):
        rows = {}
        for cell in cells:
            right = generator.random(5) < share
            more = [right * 1, right * 1] if several else [None, None]
            rows[cell] = CellResult(right * 1.0, [], *more)
        return Results(
            name, {}, {"mathvista_testmini_cot_reasoning": EvalResult(list("abcde"), rows)}
        )

    found = compare(made("x", 1.0), made("y", 0.0))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("*") - 1 == 7 * (3 if several else 1)  # one in the heading
    assert text.count("+100.0") >= 7
