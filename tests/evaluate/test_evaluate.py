"""Cells, answers, correctness per image, `roma eval` and its table."""

import io
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from roma.data import Example
from roma.evaluate import conditions
from roma.evaluate.conditions import Cell, DegradedImages, cells_of
from roma.evaluate.record import read_result
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.run import Answer, evaluate, policy_answerer, run_eval
from roma.evaluate.summary import summarise
from roma.evaluate.tables import summary_table
from roma.views import CORRUPTIONS


def _examples(count: int = 5) -> list[Example]:
    """Gray images whose mean, rounded to tens, is the answer."""
    images = [Image.new("RGB", (64, 32), (10 * i + 50,) * 3) for i in range(count)]
    return [
        Example(str(i), (image,), "<image> how bright ?", str(10 * i + 50))
        for i, image in enumerate(images)
    ]


def _read_brightness(problems, images) -> list[Answer]:
    """A model that is right as long as the mean gray value survives."""
    assert len(problems) == len(images)
    values = [10 * round(float(each[0].mean()) / 10) for each in images]
    return [Answer(rf"<think> look </think> \boxed{{{value}}}", 5) for value in values]


def test_cells_are_clean_once_and_every_corruption_of_a_pool_at_every_level():
    cells = cells_of(["clean", "seen", "unseen"], [1, 2, 3])
    assert len(cells) == 1 + 3 * 9
    assert cells[0] == Cell() and str(cells[0]) == "clean"
    assert {cell.corruption for cell in cells if cell.pool == "seen"} == {
        "gaussian_noise",
        "gaussian_blur",
        "jpeg",
        "downscale",
    }
    assert cells_of(["seen", "seen"], [3, 3]) == cells_of(["seen"], [3])
    assert cells_of(["clean", "seen"], [3, 1]) == cells_of(["clean", "seen"], [1, 3])


@pytest.mark.parametrize(
    ("pools", "levels", "message"),
    [
        (["sen"], [1], "pools: expected .*, got 'sen'; did you mean 'seen'?"),
        (["clean", "unsen"], [1], "did you mean 'unseen'?"),
        ([], [1], "pools: expected .*, got none; name at least one pool"),
        (["seen"], [], "levels: expected at least one level, got none"),
        (["seen"], [0], "levels: expected 1 to . , the levels of gaussian_noise, got 0"),
        (["clean", "seen"], [1, 9], "levels: expected 1 to .*got 9"),
    ],
)
def test_an_unknown_pool_or_level_is_named(pools, levels, message):
    with pytest.raises(ValueError, match=message.replace(". ,", ".,").replace("?", r"\?")):
        cells_of(pools, levels)


def test_the_pixels_of_a_cell_depend_on_the_example_and_the_seed_alone():
    examples = _examples()
    noise = Cell("seen", "gaussian_noise", 2)
    every = DegradedImages(examples, cells_of(["clean", "seen"], [1, 2]), seed=7)
    alone = DegradedImages(examples[3:], [noise], seed=7)
    other = DegradedImages(examples[3:], [noise], seed=8)
    np.testing.assert_array_equal(every.at(noise)[3][0], alone.at(noise)[0][0])
    assert (alone.at(noise)[0][0] != other.at(noise)[0][0]).any()
    assert every.at(noise)[0][0].shape == (32, 64, 3)
    assert every.at(noise)[0][0].dtype == np.uint8


def test_two_images_of_one_example_get_noise_of_their_own():
    gray = Image.new("RGB", (64, 32), (128,) * 3)
    example = Example("pair", (gray, gray), "<image> <image> same ?", "yes")
    first, second = DegradedImages([example], [Cell("seen", "gaussian_noise", 3)]).at(
        Cell("seen", "gaussian_noise", 3)
    )[0]
    assert (first != second).any()


def test_images_are_resized_before_they_are_degraded_and_each_cell_is_made_once():
    noise = Cell("seen", "gaussian_noise", 1)
    images = DegradedImages(_examples(2), [Cell(), noise], resize=lambda image: image[::2, ::2])
    assert images.at(Cell())[0][0].shape == images.at(noise)[0][0].shape == (16, 32, 3)
    assert images.at(noise) is images.make_all().at(noise)
    anew = DegradedImages(_examples(2), [noise], keep=False)
    assert anew.at(noise) is not anew.at(noise)
    with pytest.raises(KeyError):
        anew.at(Cell("seen", "jpeg", 1))


def test_levels_come_from_the_table_that_was_given_and_cells_survive_pickling():
    jpeg = Cell("seen", "jpeg", 1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    examples = [Example("0", (noise,), "<image> ?", "1")]
    harder = {**CORRUPTIONS, "jpeg": replace(CORRUPTIONS["jpeg"], levels=(5,))}
    mild, harsh = (
        DegradedImages(examples, [jpeg], corruptions=table) for table in (CORRUPTIONS, harder)
    )
    assert (mild.at(jpeg)[0][0] != harsh.at(jpeg)[0][0]).any()
    again = pickle.loads(pickle.dumps(mild.make_all()))
    np.testing.assert_array_equal(again.at(jpeg)[0][0], mild.at(jpeg)[0][0])


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        DegradedImages([], [Cell()])


def test_evaluate_counts_right_answers_per_image_whatever_the_batch_size():
    images = DegradedImages(_examples(5), cells_of(["clean", "seen"], [1]))
    seen = []
    result = evaluate(_read_brightness, images, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1] * 5
    assert result.cells[Cell()].correct.tolist() == [1] * 5
    assert result.cells[Cell()].correct.dtype == np.uint8
    assert result.cells[Cell()].texts[0] == r"<think> look </think> \boxed{50}"
    again = evaluate(_read_brightness, images, batch_size=5)
    assert all((again.cells[c].correct == result.cells[c].correct).all() for c in images.cells)


def test_an_answer_that_does_not_end_by_itself_is_scored_as_unfinished():
    images = DegradedImages(_examples(3), [Cell()])
    handed = []

    def score(rows):
        handed.extend(rows)
        return [{"overall": 0.0, "format": 0.0, "accuracy": float(r["finished"])} for r in rows]

    def answer(problems, images):
        return [Answer("\\boxed{1}", 9, finished=i > 0) for i in range(len(problems))]

    assert evaluate(answer, images, score=score).cells[Cell()].correct.tolist() == [0, 1, 1]
    assert handed[0] == {
        "response": "\\boxed{1}",
        "response_length": 9,
        "ground_truth": "50",
        "finished": False,
        "problem": "<image> how bright ?",
        "id": "0",
    }


def test_evaluate_refuses_a_bad_batch_size_and_missing_answers():
    images = DegradedImages(_examples(2), [Cell()])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        evaluate(_read_brightness, images, batch_size=0)
    with pytest.raises(ValueError, match="answer: expected 2 answers, got 0"):
        evaluate(lambda problems, images: [], images)


def test_results_survive_a_file(tmp_path):
    images = DegradedImages(_examples(3), cells_of(["clean", "unseen"], [2]))
    result = evaluate(_read_brightness, images)
    result.save(tmp_path / "result.json")
    again = EvalResult.load(tmp_path / "result.json")
    assert again.ids == result.ids and list(again.cells) == list(result.cells)
    for cell, found in result.cells.items():
        assert again.cells[cell].texts == found.texts
        assert again.cells[cell].correct.tolist() == found.correct.tolist()


def test_the_summary_averages_over_corruptions_first():
    images = DegradedImages(_examples(4), cells_of(["clean", "seen"], [1, 3]))
    summary = summarise(evaluate(_read_brightness, images))
    assert summary["images"] == 4
    assert list(summary["pools"]) == ["clean", "seen"]
    assert set(summary["pools"]["clean"]) == {"mean", "low", "high", "n"}
    rows = [row for row in summary["detail"] if (row["pool"], row["level"]) == ("seen", 3)]
    assert len(rows) == sum(c.pool == "seen" for c in CORRUPTIONS.values())
    by_hand = sum(row["mean"] for row in rows) / len(rows)
    assert summary["pools"]["seen"]["L3"]["mean"] == pytest.approx(by_hand, abs=1e-3)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """An untrained model with the demo's shapes, and four of the demo's questions."""
    from roma.data import DIGIT_WORDS, write_digits
    from roma.models.small import build_small_vlm

    folder = tmp_path_factory.mktemp("eval")
    build_small_vlm(folder / "model", words=DIGIT_WORDS)
    write_digits(folder / "data", train=1, val=1, test=4)
    return folder


def test_roma_eval_prints_a_table_and_keeps_answers_tables_and_a_plot(small_model, tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    summary = run_eval(
        small_model / "model",
        f"{small_model / 'data'}@test",
        pools=["clean", "seen"],
        levels=[1, 3],
        out=tmp_path,
        batch_size=3,
        max_new_tokens=4,
        console=console,
    )
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8")) == summary
    assert summary["images"] == 4 and len(summary["detail"]) == 1 + 4 * 2
    assert summary["pools"]["seen"]["L3"]["n"] == 4
    text = " ".join(console.export_text().split())
    assert "seen: mean" in text and "gaussian_noise" in text and "eval.json" in text
    assert "clean: {mean:.1f} [{low:.1f}".format(**summary["pools"]["clean"]) in text
    with Image.open(tmp_path / "eval.png") as plot:
        assert plot.width > 500
    result = read_result(tmp_path / "answers.jsonl")
    assert len(result.cells) == 9 and len(result.ids) == 4
    assert "| data@test |" in (tmp_path / "eval.md").read_text(encoding="utf-8")
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert settings["questions"] == 4 and settings["batch_size"] == 3
    assert settings["cells"][0] == {"pool": "clean", "corruption": None, "level": 0}
    where = {"pool": "seen", "corruption": "gaussian_noise", "level": 3}
    assert settings["cells"][2] == where | {"parameter": 0.18, "reference_size": None}


def test_a_bad_image_is_left_out_before_the_first_answer(small_model, tmp_path):
    rows = []
    for name in ("good", "bad", "last"):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (32, 32), "gray").save(path)
        rows.append({"images": [path.name], "problem": "<image>How many?", "answer": "1"})
    (tmp_path / "bad.png").write_bytes(b"no image")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = io.StringIO()
    asked = {"pools": ["clean"], "max_new_tokens": 2, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"row 1: .*--skip-broken"):
        run_eval(small_model / "model", data, **asked | {"out": tmp_path / "whole"})
    asked["console"] = Console(file=said)
    summary = run_eval(small_model / "model", data, skip_broken=True, **asked)
    assert summary["images"] == 2 and read_result(tmp_path / "out/answers.jsonl").ids == ["0", "2"]
    assert "rows.jsonl, row 1: images[0]: expected an image" in said.getvalue()


def test_greedy_answers_do_not_depend_on_the_batch(small_model):
    from roma.data import load_dataset_rows
    from roma.models.qwen_vl import Policy

    policy = Policy.load(small_model / "model")
    images = DegradedImages(list(load_dataset_rows(small_model / "data", split="test")), [Cell()])
    answer = policy_answerer(policy, max_new_tokens=6)
    one, all_at_once = (evaluate(answer, images, batch_size=size) for size in (1, 4))
    assert one.cells[Cell()].texts == all_at_once.cells[Cell()].texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pools": ["unsene"]}, "did you mean 'unseen'"),
        ({"levels": [7]}, "levels: expected 1 to"),
        ({"limit": 0}, "limit: expected at least 1, or None, got 0"),
        ({"model": "data"}, "model: expected a Hugging Face model's folder, got no config.json"),
        ({"device": "tpu"}, "device: expected a device that torch can use here, got 'tpu'"),
        ({"device": "cuda:99"}, "device: expected a device that torch can use here, got 'cuda:99'"),
        (
            {"level_table": "no.yaml"},
            "level table: expected a YAML file, got no file no.yaml; a rel",
        ),
    ],
)
def test_roma_eval_names_what_is_wrong_before_it_answers(small_model, options, message):
    model = small_model / options.pop("model", "model")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_eval(model, f"{small_model / 'data'}@test", **options)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"level_table": "no.yaml"}])
def test_a_device_and_a_level_table_are_looked_at_before_the_model(options):
    with pytest.raises((ValueError, FileNotFoundError), match=r"device|level table"):
        run_eval("no-such-model", "no-such-data", **options)


def test_two_datasets_and_two_checkpoints_have_folders_of_their_own(
    small_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_model / "model", tmp_path / "run" / "global_step_3" / "actor")
    options = {"pools": ["clean"], "batch_size": 4, "max_new_tokens": 1}
    for data in ("data@test", "data@val", "data/val.parquet"):
        run_eval(small_model / "model", small_model / data, console=_quiet(), **options)
    run_eval("run/global_step_3/actor", small_model / "data@val", console=_quiet(), **options)
    assert sorted(path.parent.name for path in tmp_path.glob("runs/eval/*/eval.json")) == [
        "model-data-test",
        "model-data-val",
        "model-val",
        "run-global_step_3-data-val",
    ]


def _quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("levels", [[1], [1, 2, 3], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
def test_the_table_shows_every_number_in_80_columns(levels, right):
    cells = cells_of(["clean", "seen", "unseen"], levels)
    drawn = np.random.default_rng(0)
    found = {c: CellResult((drawn.random(30) < right).astype(np.uint8), [""] * 30) for c in cells}
    summary = summarise(EvalResult([str(i) for i in range(30)], found))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    lines = text.splitlines()
    assert lines[0] == "Accuracy, % [95 % interval], 30 images"
    assert lines[1].startswith("clean: ") and lines[1].endswith("]")
    assert max(map(len, lines)) <= 80 and "…" not in text
    for row in summary["detail"]:
        name = row["corruption"] or "clean"
        assert name in text and f"{row['mean']:.1f}" in text
        low, high = f"{row['low']:.1f}", f"{row['high']:.1f}"
        assert f"[{low}, {high}]" in text or f"{low}–{high}" in text


def test_the_seed_of_an_image_is_of_its_question_place_corruption_and_level(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        conditions, "degrade_batch", lambda images, _, own, **__: seeds.extend(own) or images
    )
    keys = [("a", 0), ("a", 1), ("b", 0)]
    for run in (0, 1):
        for name, level in (("gaussian_noise", 1), ("gaussian_noise", 2), ("jpeg", 1)):
            conditions.degrade_at(Cell("seen", name, level), [None] * 3, keys, seed=run)
    assert len(seeds) == len(set(seeds)) == 18
