"""The digits: disjoint scans, true answers, images that show what the text says; writing."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from roma.data import DIGIT_WORDS, write_charts, write_digits
from roma.data.synthetic.charts import chart_questions
from roma.data.synthetic.digits import digit_questions, digit_scans
from roma.rewards import compute_score


def test_scans_of_the_splits_are_disjoint() -> None:
    scans = {split: digit_scans(split) for split in ("train", "val", "test")}
    sizes = {split: len(labels) for split, (_, labels) in scans.items()}
    assert sizes == {"train": 1085, "val": 357, "test": 355}
    seen = [{scan.tobytes() for scan in images} for images, _ in scans.values()]
    # the 1797 scans are all different, so equal pixels would be the same scan
    assert len(set.union(*seen)) == sum(sizes.values()) == 1797
    for _, labels in scans.values():
        assert (np.bincount(labels, minlength=10) >= 34).all()


def test_digit_questions_are_true_and_well_formed() -> None:
    problems = set()
    for question in digit_questions("val", 200, seed=1):
        words = question.solution.split(" ")
        assert len(words) == 11  # and the end token: 12
        left, right = int(words[2]), int(words[4])
        expected = left + right if "sum" in question.problem else max(left, right)
        assert question.answer == str(expected)
        assert set(question.problem.split(" ")[1:]) | set(words) <= set(DIGIT_WORDS)
        scored = compute_score([{"response": question.solution, "ground_truth": question.answer}])
        assert scored[0]["overall"] == 1.0
        problems.add(question.problem)
        assert question.image.shape == (32, 64, 3) and question.image.max() > 150
    assert problems == {"<image> sum ?", "<image> larger ?"}
    assert len(set(DIGIT_WORDS)) == len(DIGIT_WORDS)


def test_a_digit_question_shows_the_digits_it_names() -> None:
    # The nearest training scan, after shrinking each half back to 8×8, mostly has the right label.
    scans, labels = digit_scans("train")
    flat = scans.reshape(len(scans), -1).astype(float)
    right = 0
    for question in digit_questions("test", 100):
        words = question.solution.split(" ")
        for half, label in ((question.image[:, :32], words[2]), (question.image[:, 32:], words[4])):
            ink = half[..., 0] > half[..., 0].min() + 60
            rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
            start = max(0, int(columns.mean()) - 13)
            box = half[rows[0] : rows[-1] + 1, start : start + 26, 0]
            small = np.asarray(Image.fromarray(box).resize((8, 8), Image.Resampling.BOX), float)
            small -= small.min()
            near = np.abs(flat - small.ravel() * (255 / small.max())).sum(1).argmin()
            right += labels[near] == int(label)
    assert right > 130


@pytest.mark.parametrize("questions", [digit_questions, chart_questions])
def test_a_question_depends_on_seed_split_and_number_alone(questions: Any) -> None:
    few, many = list(questions("test", 2, seed=5)), list(questions("test", 4, seed=5))
    for a, b in zip(few, many, strict=False):
        assert np.array_equal(a.image, b.image) and a.solution == b.solution
    images = [q.image.tobytes() for split in ("train", "test") for q in questions(split, 3, seed=5)]
    images += [q.image.tobytes() for q in questions("test", 3, seed=6)]
    assert len(set(images)) == 9


def test_writers_refuse_wrong_sizes_and_formats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sizes: expected 0 or more rows"):
        write_digits(tmp_path, train=-1)
    with pytest.raises(ValueError, match="sizes: expected"):
        write_charts(tmp_path, train=0, val=0, test=0)
    with pytest.raises(ValueError, match="format: expected parquet or jsonl or hf, got 'csv'"):
        write_charts(tmp_path, format="csv")
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        write_charts(tmp_path, seed=-1)
    with pytest.raises(ValueError, match="split: expected train or val or test, got 'dev'"):
        next(digit_questions("dev", 1))
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    digit_scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"need scikit-learn; pip install 'roma-vlm\[train\]'"
    ):
        digit_scans("train")
