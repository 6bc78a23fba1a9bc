"""The bars: true answers, images that show what the chain names, chains that can be read back."""

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.digits.arms import ARMS
from experiments.science.bars import (
    BAR_WORDS,
    BARS,
    HASTY,
    TOP,
    UNIT,
    bar_questions,
    named_marks,
)
from roma.data.synthetic.writer import Question
from roma.rewards import compute_score
from roma.train.config import load_config, to_dict
from roma.train.config.schema import leaves
from roma.views import load_levels

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return list(bar_questions("val", 300, seed=1))


def measured(image: NDArray[np.uint8]) -> tuple[int, ...]:
    """Heights by the pixels alone: for each bar the step of colour that leaves the least squares.

    Columns 7 and 8 of a quarter are ink for every width and place, 0 to 2 and 13 to 15 never.
    """
    pixels = image.astype(float).reshape(32, BARS, 16, 3)
    free = pixels[:, :, [0, 1, 2, 13, 14, 15]]
    axis = 28 + int(free[28:].mean((1, 2, 3)).argmax())  # the one bright row at the foot
    rows = (pixels[:, :, 7:9].mean(2) - free.mean(2))[:axis][::-1]  # from the axis upwards
    found = []
    for step in rows.transpose(1, 0, 2):
        means = [step[: n * UNIT].mean(0) for n in range(1, TOP + 1)]
        rest = [
            ((step[: n * UNIT] - mean) ** 2).sum() + (step[n * UNIT :] ** 2).sum()
            for n, mean in enumerate(means, 1)
        ]
        best = int(np.argmin(rest))
        found.append(best + 1 if abs(means[best]).max() > 11 else 0)
    return tuple(found)


def answer_of(problem: str, marks: tuple[int, ...]) -> int:
    """By sorting and counting, not step by step."""
    asked, *threshold = problem.removeprefix("<image> ").removesuffix(" ?").split()
    if asked == "above":
        return sum(np.greater(marks, int(threshold[0])).tolist())
    ordered = sorted(marks)
    return {"sum": int(np.sum(marks)), "range": ordered[-1] - ordered[0]}[asked]


def test_images_show_the_marks_that_the_chains_name(questions: list[Question]) -> None:
    for question in questions:
        assert question.image.shape == (32, 64, 3) and question.image.dtype == np.uint8
        assert measured(question.image) == named_marks(question.solution)
    shown = np.array([named_marks(question.solution) for question in questions])
    assert shown.shape == (300, BARS) and set(shown.ravel()) == set(range(TOP + 1))


def test_answers_are_true_and_words_known(questions: list[Question]) -> None:
    asked = set()
    for question in questions:
        marks = measured(question.image)
        assert question.answer == str(answer_of(question.problem, marks))
        words = [*question.problem.split(" ")[1:], *question.solution.split(" ")]
        assert set(words) <= set(BAR_WORDS)
        scored = compute_score([{"response": question.solution, "ground_truth": question.answer}])
        assert scored[0]["overall"] == 1.0
        asked.add(question.problem.split()[1])
    assert asked == {"sum", "range", "above"}
    assert len(set(BAR_WORDS)) == len(BAR_WORDS)


def test_worked_chains_compute_right_and_hasty_ones_do_not_compute(
    questions: list[Question],
) -> None:
    worked = [q for q in questions if " about " not in q.solution]
    assert 1 - len(worked) / len(questions) == pytest.approx(HASTY, abs=0.1)
    for question in worked:
        steps = re.findall(r"(\d+) ([+-]) (\d+) is (\d+)", question.solution)
        for left, sign, right, result in steps:
            signed = int(right) * (1 if sign == "+" else -1)
            assert int(left) + signed == int(result)
        last = steps[-1][-1] if steps else re.findall(r"count (\d+)", question.solution)[0]
        assert last == question.answer
        assert len(question.solution.split(" ")) + 1 in (23, 26, 29)
    hasty = {len(q.solution.split(" ")) for q in questions if " about " in q.solution}
    assert hasty == {13}


def test_a_question_depends_on_seed_split_and_number_alone() -> None:
    few, many = (list(bar_questions("test", size, seed=5)) for size in (2, 4))
    for a, b in zip(few, many, strict=False):
        assert np.array_equal(a.image, b.image)
        assert (a.problem, a.solution) == (b.problem, b.solution)
    kinds = [("train", 5), ("val", 5), ("test", 5), ("test", 6)]
    images = [q.image.tobytes() for s, seed in kinds for q in bar_questions(s, 3, seed=seed)]
    assert len(set(images)) == 12
    with pytest.raises(ValueError, match="split: expected train or val or test, got 'dev'"):
        next(bar_questions("dev", 1))


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        (r"<think> bars 3 7 2 5 so 3 + 7 is 10 , 10 + 2 is 12", (3, 7, 2, 5)),
        ("  <think> bars 0 0 9 1 so about 10 </think>", (0, 0, 9, 1)),
        ("<think> bars 3 7 2 so", (3, 7, 2)),  # one too few
        ("<think> bars 3 7 2 5 1 so highest", (3, 7, 2, 5, 1)),  # one too many
        ("<think> bars 36 7 2 5 so highest", (36, 7, 2, 5)),  # a mark that no bar can have
        ("<think> bars so highest 3", None),
        ("<think> bars 3 7 + 5 so", None),
        ("<think> bars 3 7 2 5", None),  # cut off before the reading is done
        ("<think> so 3 + 7 is 10", None),
        ("bars 3 7 2 5 so 17", None),
        (r"\boxed{ 17 }", None),
        ("", None),
    ],
)
def test_marks_of_a_chain(text: str, marks: tuple[int, ...] | None) -> None:
    assert named_marks(text) == marks


def test_the_configuration() -> None:
    own = load_config(CONFIGS / "bars.yaml")
    assert own.algorithm.views.k == 4 and own.algorithm.view_mode == "roma"
    longest = max(len(q.solution.split(" ")) + 1 for q in bar_questions("train", 30))
    assert longest == 29 <= own.data.max_response_length
    places = (own.data.train_files, own.data.val_files, own.worker.actor.model_path)
    assert all("runs/science/bars/" in str(place) for place in (*places, own.trainer.out))
    for arm in ("grpo", "naive"):
        other = load_config(CONFIGS / "bars.yaml", ARMS[arm].overrides)
        changed = {
            key for key, value in leaves(to_dict(other)) if value != dict(leaves(to_dict(own)))[key]
        }
        assert changed == {"algorithm.view_mode"}


def test_the_levels() -> None:
    table = load_levels(CONFIGS / "bars_levels.yaml")
    measured = [c for c in table.values() if c.pool in ("seen", "unseen")]
    assert len(measured) == 9 and all(len(c.levels) == 5 for c in measured)
    assert all(c.reference_size is None for c in measured)
    own = load_config(CONFIGS / "bars.yaml").algorithm.views
    assert own.max_level < 5  # one level at least lies beyond training
