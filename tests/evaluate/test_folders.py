"""Folders of results: what either command writes is read; what is not finished is refused."""

import json

import pytest
from support.result_folders import BLUR, write_bench, write_eval

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import load_results


def test_a_folder_of_roma_eval_is_one_benchmark_named_after_its_data(tmp_path):
    found = load_results(write_eval(tmp_path / "a"))
    assert (found.name, list(found.benchmarks)) == ("a", ["digits@test"])
    result = found.benchmarks["digits@test"]
    assert result.ids == ["q0", "q1"] and list(result.cells) == [Cell(), BLUR]
    assert result.cells[BLUR].correct.tolist() == [1, 0] and result.cells[BLUR].texts == []
    assert found.settings["seed"] == 0
    again = load_results(tmp_path / "a", texts=True, name="mine")
    assert again.name == "mine"
    assert again.benchmarks["digits@test"].cells[BLUR].texts == ["said", "said"]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("d/first.parquet", "first"),
        ("a/b/", "b"),
        ("set.v2@val", "set.v2@val"),
        ("me@home/a@val", "a@val"),
        ("me@home/a.jsonl", "a"),
    ],
)
def test_the_name_of_data(tmp_path, data, name):
    folder = write_eval(tmp_path / "a", settings={"data": data})
    assert list(load_results(folder).benchmarks) == [name]


def test_a_folder_of_bench_vlm_has_its_benchmarks_in_the_order_asked(tmp_path):
    found = load_results(write_bench(tmp_path / "b"))
    assert {name: len(each.ids) for name, each in found.benchmarks.items()} == {
        "mmstar": 3,
        "ai2d": 4,
    }
    assert list(found.benchmarks) == ["mmstar", "ai2d"]


def test_a_run_that_did_not_end_is_refused_unless_that_is_asked_for(tmp_path):
    one = write_eval(tmp_path / "a", finished=False)
    with pytest.raises(ValueError, match=r"a finished run, with eval\.json, got none in .*again"):
        load_results(one)
    assert load_results(one, finished=False).benchmarks
    two = write_bench(tmp_path / "b", finished=False)
    with pytest.raises(ValueError, match=r"a finished run, with bench\.json"):
        load_results(two)
    assert load_results(two, finished=False).benchmarks


def test_a_benchmark_that_was_asked_for_and_is_not_there_is_named(tmp_path):
    folder = write_bench(tmp_path / "b")
    (folder / "ai2d" / "answers.jsonl").unlink()
    with pytest.raises(ValueError, match=r"results in .*: expected mmstar, ai2d, got mmstar"):
        load_results(folder)


def test_a_folder_without_results_is_refused_in_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings\.json, got no folder .*none-here"):
        load_results(tmp_path / "none-here")
    with pytest.raises(FileNotFoundError, match=r"settings\.json, got none in"):
        load_results(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"answers\.jsonl, got none in"):
        load_results(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: expected a JSON object"):
        load_results(tmp_path)


def test_settings_without_data_are_none_of_roma_eval(tmp_path):
    folder = write_eval(tmp_path / "a")
    (folder / "settings.json").write_text(json.dumps({"seed": 0}))
    with pytest.raises(ValueError, match=r'expected a key "data", got none'):
        load_results(folder)
