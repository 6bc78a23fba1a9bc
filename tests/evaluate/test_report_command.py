"""`roma report` of folders as the commands leave them, and the answers that flip."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from support import small_model
from support.result_folders import BLUR, CLEAN, write_bench, write_eval

from roma.cli import main
from roma.data import load_dataset_rows
from roma.evaluate.conditions import Cell, DegradedImages, cells_of
from roma.evaluate.record import read_rows
from roma.evaluate.report import command
from roma.evaluate.report.cards import GalleryItem, cards, short_answer
from roma.evaluate.report.command import run_report
from roma.evaluate.report.flips import choose_flips, texts_of, with_images
from roma.evaluate.report.plots import styles_of
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.run import run_eval
from roma.models.processor import Processor
from roma.views import load_levels

NOISE = Cell("seen", "gaussian_noise", 2)
TABLE = (
    "gaussian_noise: {levels: [0.2, 0.5]}\ngaussian_blur: {levels: [1, 2], reference_size: 64}\n"
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder of `roma eval` whose clean answers are all right, and the others all wrong."""
    root = tmp_path_factory.mktemp("evaluated")
    (root / "levels.yaml").write_text(TABLE)
    run_eval(
        small_model.folder() / "model",
        f"{small_model.folder() / 'data'}@test",
        pools=["clean", "seen"],
        levels=[2],
        level_table=root / "levels.yaml",
        out=root / "mine",
        seed=5,
        max_new_tokens=2,
        console=Console(file=io.StringIO()),
    )
    answers = root / "mine" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [row | {"correct": [int(row["cell"][0] == "clean")]} for row in rows]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "mine"


def test_the_images_of_flips_are_those_the_model_saw(evaluated):
    """Byte for byte, at another table of levels and another seed than the customary ones."""
    settings = json.loads((evaluated / "settings.json").read_text())
    flips = [("0", NOISE), ("3", Cell("seen", "gaussian_blur", 2))]
    items = with_images(texts_of(flips, {"mine": evaluated / "answers.jsonl"}), flips, settings)
    model, data = small_model.folder() / "model", small_model.folder() / "data@test"
    rows, table = load_dataset_rows(data), load_levels(evaluated.parent / "levels.yaml")
    images = DegradedImages(
        [rows[i] for i in range(len(rows))],
        cells_of(["clean", "seen"], [2], table),
        resize=Processor.load(model).resize,
        corruptions=table,
        seed=5,
    )
    for item, (id, cell) in zip(items, flips, strict=True):
        np.testing.assert_array_equal(item.clean, images.at(Cell())[int(id)][0])
        np.testing.assert_array_equal(item.degraded, images.at(cell)[int(id)][0])
        assert (item.clean != item.degraded).any()
        assert item.truth == rows[int(id)].answer and item.condition == str(cell)
        said = {(row.id, row.cell): row for row in read_rows(evaluated / "answers.jsonl")}
        for where, at in (("clean", Cell()), ("degraded", cell)):
            expected = short_answer(said[id, at].texts[0]), at == Cell()
            assert item.answers["mine"][where] == expected


def test_the_page_shows_them_and_goes_on_without(evaluated, tmp_path):
    page = run_report([str(evaluated)], out=tmp_path / "with")[0].read_text(encoding="utf-8")
    cards = page.partition('id="gallery"')[2]
    assert cards.count('<div class="card">') == 4  # each question once
    assert cards.count("data:image/png;base64,") == 8 and "truth: " in cards
    settings = evaluated / "settings.json"
    kept = settings.read_text()
    try:
        settings.write_text(kept.replace("data@test", "gone@test"))
        page = run_report([str(evaluated)], out=tmp_path / "without")[0].read_text(encoding="utf-8")
        settings.write_text(kept.replace("data@test", "data@val"))
        other = run_report([str(evaluated)], out=tmp_path / "other")[0].read_text(encoding="utf-8")
    finally:
        settings.write_text(kept)
    assert re.search(r"<li>The images are not shown: there is no data at [^<]*gone, seen", page)
    assert re.search(r"<li>The images are not shown: [^<]*@val has other questions now", other)
    for text in (page, other):
        cards = text.partition('id="gallery"')[2]
        assert cards.count('<div class="card">') == 4 and "data:image" not in cards


def test_only_answers_that_turn_wrong_are_chosen_and_the_hardest_first():
    ids = [f"q{i}" for i in range(6)]

    def result(**cells):
        named = {"clean": Cell(), "mild": Cell("seen", "jpeg", 1), "hard": Cell("seen", "jpeg", 3),
                 "attack": Cell("adversarial", "pgd", 3)}  # fmt: skip
        made = {named[k]: CellResult(np.array(list(map(int, v))), []) for k, v in cells.items()}
        return EvalResult(ids, made)

    one = result(clean="111100", mild="110111", hard="011100", attack="000000")
    two = result(clean="000011", mild="000011", hard="000010", attack="000000")
    found = dict(choose_flips({"one": one, "two": two}))
    hard, mild = Cell("seen", "jpeg", 3), Cell("seen", "jpeg", 1)
    assert found == {"q0": hard, "q5": hard, "q2": mild}
    assert list(found)[-1] == "q2"
    assert len(choose_flips({"one": one, "two": two}, items=2)) == 2
    assert choose_flips({"one": result(clean="111111")}) == []
    assert choose_flips({"one": result(hard="000000")}) == []


def test_an_answer_without_a_box_is_shown_by_its_end():
    assert short_answer("because " * 50 + "Answer: B").endswith("because Answer: B")
    assert len(short_answer("because " * 50)) < 130
    assert short_answer(" \n") == "(nothing)"


def test_names_of_runs_and_notes_of_their_own(tmp_path):
    folder = write_eval(tmp_path / "a=b")  # a sign in a folder's own name
    other = write_eval(tmp_path / "other", right={CLEAN: (1, 1), BLUR: (0, 1)})
    (other / "eval.json").write_text('{"unscored": 3}')
    written = run_report([str(folder), f"mine={other}"], out=tmp_path / "out", against="mine")
    text = written[1].read_text(encoding="utf-8")
    assert "| digits@test | a=b |" in text and "| digits@test | mine |" in text
    assert "* mine: 3 answers could not be scored; they count as wrong." in text
    assert "## Minus mine, points" in text


def test_a_suite_is_reported_with_its_notes(tmp_path):
    run = write_bench(tmp_path / "run")
    (run / "bench.json").write_text('{"notes": ["tasks ask no judge of their own"]}')
    text = run_report([str(run)], out=tmp_path)[1].read_text(encoding="utf-8")
    assert "* tasks ask no judge of their own." in text
    assert "| average over 2 benchmarks | 41.7 [" in text  # 1 of 3 and 2 of 4


def test_wrong_runs_are_one_line(tmp_path, capsys):
    one = write_eval(tmp_path / "one")
    cut = write_eval(tmp_path / "cut", finished=False)
    suite = write_bench(tmp_path / "suite")
    others = write_eval(tmp_path / "others", ids=("q0", "q9"))
    damaged, begun = (
        write_eval(tmp_path / "damaged"),
        write_bench(tmp_path / "begun", "", finished=False),
    )
    (damaged / "eval.json").write_text("{")
    for runs, message in (
        ([tmp_path / "none"], "no folder"),
        ([cut], "expected a finished run"),
        ([begun], "unfinished one, of which no answer is scored yet; run the same command again"),
        ([damaged], "eval.json: expected what a run wrote, as JSON, got a damaged file; run the"),
        ([one, suite], "results of suite: expected the benchmarks of one"),
        ([one, others], "q9"),
        ([one, one], "'one' twice"),
        ([one, "--against", "two"], "against: expected one of one"),
        ([one, "--out", one / "answers.jsonl"], "out: expected a folder"),
    ):
        assert main(["report", *map(str, runs)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_a_gallery_has_twelve_questions_whatever_the_number_of_benchmarks(tmp_path, monkeypatch):
    runs = [write_bench(tmp_path / "run", names="abcdefg")]
    asked = []
    monkeypatch.setattr(command, "choose_flips", lambda _, items: asked.append(items) or [])
    command.run_report([str(runs[0])], out=tmp_path / "out")
    assert sum(asked) == 12 and set(asked) == {1, 2}


def test_without_the_degradations_the_page_goes_on_without_images(evaluated, tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("DALI is not installed")

    monkeypatch.setattr(command, "with_images", missing)
    page = run_report([str(evaluated)], out=tmp_path)[0].read_text(encoding="utf-8")
    assert "<li>The images are not shown: they could not be made again (DALI" in page


def test_of_several_answers_all_must_turn():
    right, after = np.array([1, 0.5, 1, 1]), np.array([0, 0, 0.5, 0])
    found = {Cell(): CellResult(right, []), NOISE: CellResult(after, [])}
    assert {id for id, _ in choose_flips({"m": EvalResult([*"abcd"], found)})} == {"a", "d"}


def test_hostile_text_of_a_card_is_escaped():
    hostile = "<img src=x>"
    answers = {hostile: {"clean": (hostile, True), "degraded": (hostile, False)}}
    item = GalleryItem(hostile, hostile, hostile, None, None, answers)
    page = cards([item], styles_of([hostile]).__getitem__)
    assert "<img" not in page and page.count("&lt;img src=x&gt;") == 6
