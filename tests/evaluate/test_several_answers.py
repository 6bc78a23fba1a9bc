"""Several answers to a question: how they are sampled, scored, voted on; and what one run holds."""

import io
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support import small_model

from roma.data import Example
from roma.evaluate import figures, stream
from roma.evaluate.answers import Answer, judged, vote
from roma.evaluate.conditions import Cell, DegradedImages
from roma.evaluate.record import Record, read_rows
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.run import run_eval
from roma.evaluate.stream import answer_all, unit_of
from roma.rewards import Failed, compute_score


@pytest.mark.parametrize(
    ("texts", "first"),
    [
        ([r"\boxed{1}", r"\boxed{2}", r"\boxed{2}"], 1),
        ([r"\boxed{1}", r"\boxed{2}", r"\boxed{2}", r"\boxed{1}"], 0),  # a tie: the earliest
        ([r"\boxed{3}", r"so \boxed{1/2}", r"\boxed{0.50}"], 1),  # the same number
        ([r"\boxed{9} no, \boxed{4}", r"\boxed{9}", r"\boxed{9}"], 1),  # the last box counts
        ([r"\boxed{B}", "<think> 1 </think> B", "<think> 2 </think> B"], 1),  # a box is another
        ([r"\boxed{1}", r"\boxed{}", r"\boxed{}"], 1),
        (["x", "", ""], 1),
    ],
)
def test_the_vote_is_the_most_frequent_final_answer(texts: list[str], first: int) -> None:
    assert vote(texts) == first


def test_each_answer_is_scored_and_one_that_cannot_be_counts_as_wrong() -> None:
    asked = [Example(id, (), "?", "5") for id in "ab"]
    right, wrong = Answer(r"<think> </think> \boxed{5}", 3), Answer(r"\boxed{6}", 3)
    cut = Answer(r"\boxed{5}", 3, finished=False)
    found = judged([[wrong, right, right], [right, cut, wrong]], asked, compute_score)
    assert found == [([0, 1, 1], 1, 0), ([1, 0, 0], 1, 0)]
    assert judged([[right], [wrong]], asked, compute_score) == [([1], None, 0), ([0], None, 0)]

    def failing(rows: Any) -> list[Any]:
        return [Failed("late") if i % 2 else {"accuracy": 0.5} for i in range(len(rows))]

    found = judged([[right, right], [right, right]], asked, failing)
    assert found == [([1, 0], 1, 1), ([1, 0], 1, 1)]
    with pytest.raises(ValueError, match=r"^score: expected 2 scores, got 1"):
        judged([[right], [right]], asked, lambda rows: [{"accuracy": 1.0}])
    with pytest.raises(ValueError, match=r"^answer: expected 2 answers, got 1"):
        judged([[right]], asked, compute_score)


def by_length(rows: Any) -> list[dict[str, float]]:
    """Right: an even number of characters."""
    return [{"accuracy": float(len(row["response"]) % 2 == 0)} for row in rows]


def test_roma_eval_samples_them_and_gives_their_mean_pass_and_majority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, path: path)
    root, found = small_model.folder(), {}
    for name, options in {"a": {}, "again": {}, "other": {"seed": 1}}.items():
        found[name] = run_eval(
            root / "model",
            f"{root / 'data'}@val",
            pools=["clean", "masking"],
            levels=[1],
            out=tmp_path / name,
            answers=3,
            max_new_tokens=6,
            score=by_length,
            device="cpu",
            console=Console(file=io.StringIO()),
            **options,
        )
    rows = {name: list(read_rows(tmp_path / name / "answers.jsonl")) for name in found}
    assert rows["a"] == rows["again"]
    assert [row.texts for row in rows["a"]] != [row.texts for row in rows["other"]]
    assert all(len(row.texts) == 3 for row in rows["a"])
    assert any(len(set(row.texts)) == 3 for row in rows["a"])  # sampled apart
    clean = [row for row in rows["a"] if row.cell == Cell()]
    right = np.array([[len(text) % 2 == 0 for text in row.texts] for row in clean])
    assert 0 < right.mean() < 1 and len(clean) == 8
    entry = found["a"]["pools"]["clean"]
    assert entry["mean"] == pytest.approx(100 * right.mean(), abs=1e-3)
    passed = found["a"]["several"]["clean"]["pass"]["mean"]
    assert passed == pytest.approx(100 * right.any(1).mean(), abs=1e-3)
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["decoding"], settings["temperature"]) == ("sampled", 1.0)
    assert settings["reward"].endswith("test_several_answers:by_length")


class Counted(Sequence[Any]):
    """Questions made when they are read; counts how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most = count, weakref.WeakSet[Example](), 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.count))]
        image = Image.fromarray(np.full((8, 8, 3), at % 256, dtype=np.uint8))
        made = Example(str(at), (image,), "<image> ?", "1")
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("limit", ["_PIXELS", "_MOST"])
def test_few_questions_are_held_however_many_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(stream, limit, 90 * (64 if limit == "_PIXELS" else 1))  # 90 images of 8 × 8
    asked, seen, batches = Counted(700), [], []

    def say(problems: Any, images: Any, *, seed: int) -> list[list[Answer]]:
        batches.append(len(problems))
        seen.extend(int(image[0, 0, 0]) for (image,) in images)
        return [[Answer("x", 1)] for _ in problems]

    answer_all(
        Record(tmp_path, {}),
        asked,
        [unit_of(Cell(), say, seed=0)],
        count=650,
        images=lambda some: DegradedImages(some, [Cell()], keep=False),
        batch_size=30,
        score=by_length,
    )
    assert seen == [at % 256 for at in range(650)]
    assert batches == [30] * 21 + [20]
    assert asked.most <= 2 * 90  # a chunk, and the one before it


def test_shares_and_votes_come_back_from_a_file(tmp_path):
    share = CellResult(np.array([0.5, 1.0]), ["a", "b"], np.array([1, 1]), np.array([0, 1]))
    for found in (share, CellResult(np.array([0, 1], np.uint8), ["a", "b"])):
        EvalResult(["0", "1"], {Cell(): found}).save(tmp_path / "result.json")
        again = EvalResult.load(tmp_path / "result.json").cells[Cell()]
        np.testing.assert_equal(vars(again), vars(found))
        assert again.correct.dtype == found.correct.dtype


def test_a_batch_is_sampled_with_a_seed_of_its_cell_and_its_first_question():
    seeds = []

    def say(problems, images, *, seed):
        seeds.append(seed)
        return [[] for _ in problems]

    asked = [Example(id, (), "?", "5") for id in "ab"]
    for run in (0, 1):
        for cell in (Cell(), Cell("seen", "jpeg", 1)):
            for batch in (asked, asked[1:]):
                unit_of(cell, say, seed=run).answer(batch, [[] for _ in batch])
    assert len(set(seeds)) == 8
