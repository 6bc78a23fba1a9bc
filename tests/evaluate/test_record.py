"""The record of answers: what is on disk, what is found again, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from roma.evaluate.conditions import Cell
from roma.evaluate.record import Record, Row, read_result

CLEAN, BLUR = Cell(), Cell("seen", "gaussian_blur", 3)
AT_CLEAN = {"pool": "clean", "corruption": None, "level": 0}
AT_BLUR = {"pool": "seen", "corruption": "gaussian_blur", "level": 3, "parameter": 3.0}
ASKED = {"model": "m", "seed": 0, "cells": [AT_CLEAN, AT_BLUR]}


def row(id: str, cell: Cell = CLEAN, correct: int = 1, text: str = "Größe \n é") -> Row:
    return Row(id, cell, [text], [correct])


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "folder", ASKED)
    assert len(record) == 0 and not record.has(CLEAN, "a")
    record.add([row("a"), row("b")])
    record.add([row("b", BLUR)])
    for found in (record, Record(record.folder, ASKED)):
        asked = [(cell, id) for cell in (CLEAN, BLUR) for id in "abc"]
        assert [found.has(*each) for each in asked] == [True, True, False, False, True, False]
        assert len(found) == 3
        assert list(found.rows()) == [row("a"), row("b"), row("b", BLUR)]
    lines = (record.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == {
        "id": "b",
        "cell": ["seen", "gaussian_blur", 3],
        "correct": [1],
        "voted": None,
        "texts": ["Größe \n é"],
    }


def test_a_cut_anywhere_loses_the_line_it_is_in(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([row("a"), row("b"), row("c")])
    whole = record.path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(whole) + 1):
        record.path.write_bytes(whole[:cut])
        again = Record(tmp_path, ASKED)
        kept = sum(end <= cut for end in ends)
        assert [again.has(CLEAN, id) for id in "abc"] == [number < kept for number in range(3)]
        again.add([row(id) for id in "abc"[kept:]])
        assert record.path.read_bytes() == whole


def test_a_torn_line_may_be_long(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([row("a"), row("b", text="x" * 200_000)])
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[:-1])
    assert len(Record(tmp_path, ASKED)) == 1
    assert record.path.read_bytes() == whole[: whole.index(b"\n") + 1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "got seed = 0 there and 1 here; name another"),
        ({"cells": [AT_CLEAN]}, "got gaussian_blur L3 there alone; name another, or overwrite"),
        ({"cells": [AT_CLEAN, AT_BLUR | {"parameter": 2.0}]}, "L3 = 3.0 there and 2.0 here"),
        ({"cells": [AT_BLUR, AT_CLEAN]}, "got the conditions in another order"),
        ({"reward": "math"}, "got reward = None there and 'math' here"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, other: dict, said: str) -> None:
    Record(tmp_path, ASKED).add([row("a")])
    with pytest.raises(ValueError, match=f"^out: expected a new folder, or one begun .*{said}"):
        Record(tmp_path, ASKED | other)
    assert len(Record(tmp_path, ASKED)) == 1  # as it was
    anew = Record(tmp_path, ASKED | other, overwrite=True)
    assert len(anew) == 0 and not anew.path.exists()
    assert len(Record(tmp_path, ASKED | other)) == 0


def test_the_same_files_by_another_path_are_the_same(tmp_path: Path) -> None:
    asked = {"model": "m", "model_fingerprint": "f", "data": "d", "data_fingerprint": None}
    Record(tmp_path, asked).add([row("a")])
    assert len(Record(tmp_path, asked | {"model": "elsewhere/m"})) == 1
    other_model = {"model": "n", "model_fingerprint": "g"}
    for other in ({"model_fingerprint": "g"}, {"data": "elsewhere/d"}, other_model):
        with pytest.raises(ValueError, match=f"{next(iter(other))} = .* there and .* here"):
            Record(tmp_path, asked | other)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_process_in_the_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    record = Record(tmp_path, ASKED)
    record.add([row("a")])
    said = f"from roma.evaluate.record import Record\nRecord({str(tmp_path)!r}, {ASKED!r}"
    code = f"{said}, overwrite={overwrite})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = "ValueError: out: expected a folder of one run at a time, got another that writes to"
    assert done.stderr.splitlines()[-1].startswith(expected)
    record.add([row("b")])
    assert len(Record(tmp_path, ASKED)) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.path.mkdir()
    record._left = record._state()
    with pytest.raises(OSError, match=f"Is a directory: '{record.path}'"):
        record.add([row("a")])


def test_files_that_are_not_its_own_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FileExistsError, match=r"^out: expected a folder, got the file"):
        Record(file, ASKED)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "answers.jsonl").write_text(row("a").to_line())
    with pytest.raises(ValueError, match=r"one with answers\.jsonl and no settings\.json"):
        Record(rows, ASKED)
    other = tmp_path / "other"
    Record(other, ASKED).add([row("a")])
    for damaged in ("", "[]"):
        (other / "settings.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"settings\.json: expected what was asked, as JSON"):
            Record(other, ASKED)
    (other / "settings.json").write_text(json.dumps(ASKED))
    for damaged in ("{}\n", "nonsense\n", "[1]\n"):
        (other / "answers.jsonl").write_text(row("a").to_line() + damaged)
        with pytest.raises(ValueError, match=r"answers.jsonl, line 2: expected an answer, got '"):
            Record(other, ASKED)


def test_one_answer_is_right_or_wrong_in_the_order_of_the_questions(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([row("a", correct=1, text="first"), row("b", correct=0, text="second")])
    record.add([row("b", BLUR, 1, "fourth"), row("a", BLUR, 0, "third")])  # in another order
    found = read_result(record.path, texts=True)
    assert found.ids == ["a", "b"] and list(found.cells) == [CLEAN, BLUR]
    assert found.cells[CLEAN].correct.tolist() == [1, 0]
    assert found.cells[BLUR].correct.tolist() == [0, 1]
    assert found.cells[BLUR].correct.dtype == np.uint8
    assert found.cells[BLUR].texts == ["third", "fourth"]
    assert found.cells[BLUR].passed is None and found.cells[BLUR].voted is None
    assert read_result(record.path).cells[BLUR].texts == []


def test_of_several_answers_the_mean_and_any_and_the_vote(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([Row("a", CLEAN, ["x", "y", "z"], [0, 1, 0], 0, unscored=1)])
    record.add([Row("b", CLEAN, ["x", "y", "z"], [1, 1, 0], 1, unscored=2)])
    record.add([Row("c", CLEAN, ["x", "y", "z"], [0, 0, 0], 0)])
    assert record.unscored == Record(tmp_path, ASKED).unscored == 3
    for id, voted in (("c", 1), ("a", 0), ("b", 0)):
        record.add([Row(id, BLUR, ["x", "y", "z"], [0, 0, 0], voted)])
    other = read_result(record.path).cells[BLUR].voted
    assert other is not None and other.tolist() == [0, 0, 1]  # of a, b and c
    found = read_result(record.path, texts=True).cells[CLEAN]
    np.testing.assert_allclose(found.correct, [1 / 3, 2 / 3, 0])
    assert found.passed is not None and found.passed.tolist() == [1, 1, 0]
    assert found.voted is not None and found.voted.tolist() == [0, 1, 0]
    assert found.texts == ["x", "x", "x"]


def test_a_share_stays_one(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([Row("a", CLEAN, ["x"], [0.25]), Row("b", CLEAN, ["x"], [1.0])])
    assert read_result(record.path).cells[CLEAN].correct.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "expected all, got none; run the same command again"),
        ([row("a"), row("b"), row("a", BLUR)], "expected all, got 1 missing; run the same"),
        ([Row("a", CLEAN, ["x"])], "question a at clean: expected some scored answers, got 0"),
        (
            [row("a"), Row("b", CLEAN, ["x", "y"], [0, 1], 0)],
            "question b at clean: expected 1 scored answers, got 2",
        ),
    ],
)
def test_an_unfinished_record_is_no_result(tmp_path: Path, rows: list[Row], said: str) -> None:
    record = Record(tmp_path, ASKED)
    record.add(rows)
    with pytest.raises(ValueError, match=said):
        read_result(record.path)
    with pytest.raises(FileNotFoundError, match=r"^results: expected a file none\.jsonl, got none"):
        read_result(tmp_path / "none.jsonl")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_in_one_folder_ends_one_of_the_two(tmp_path: Path, overwrite: bool) -> None:
    """The rows of a run never stand beside another's, nor under another's settings."""
    first = Record(tmp_path, ASKED)
    if overwrite:
        first.add([row("a")])
    settings = ASKED | {"seed": int(overwrite)}
    second = Record(tmp_path, settings, overwrite=overwrite)
    second.add([row("b")])
    with pytest.raises(ValueError, match=r"^out: expected a folder of one run at a time"):
        first.add([row("c")])
    second.add([row("d")])
    assert [each.id for each in Record(tmp_path, settings).rows()] == ["b", "d"]


def test_a_run_that_had_written_nothing_does_not_go_on_under_new_settings(tmp_path: Path) -> None:
    first = Record(tmp_path, ASKED)
    Record(tmp_path, ASKED | {"seed": 1}, overwrite=True)
    with pytest.raises(ValueError, match=r"^out: expected a folder of one run"):
        first.add([row("a")])
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_row_that_stands_there_twice_is_one_and_the_newer_counts(tmp_path: Path) -> None:
    record = Record(tmp_path, ASKED)
    record.add([row("a", correct=0), row("b", correct=0), row("a", correct=1)])
    assert len(record) == len(Record(tmp_path, ASKED)) == 2
    assert read_result(record.path).cells[CLEAN].correct.tolist() == [1, 0]
