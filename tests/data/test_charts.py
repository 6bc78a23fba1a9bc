"""The charts: true answers, and bars as high as they say."""

from pathlib import Path

import numpy as np

from roma.data import write_charts
from roma.data.synthetic.charts import (
    _BOTTOM,
    _LEFT,
    _RIGHT,
    _TOP,
    BarChart,
    _count,
    chart_questions,
)
from roma.rewards import compute_score


def test_chart_questions_are_true() -> None:
    starts = set()
    for question in chart_questions("train", 80):
        assert question.image.shape == (224, 320, 3)
        assert question.problem.startswith("<image>")
        item = {"response": question.solution, "ground_truth": question.answer}
        assert compute_score([item])[0]["overall"] == 1.0
        words = question.solution.replace(".", " ").split()
        if "together" in question.problem or "more" in question.problem:
            a, sign, b = words[words.index("=") - 3 : words.index("=")]
            assert int(question.answer) == int(a) + int(f"{sign}{b}") > 0
        if question.problem.startswith("<image>Which bar"):
            assert question.answer in words
        starts.add(" ".join(question.problem.split()[:3]))
    assert len(starts) >= 5


def test_a_bar_that_ends_at_the_limit_is_not_higher() -> None:
    colours = ("#ff0000", "#00ff00", "#0000ff")
    for seed in range(20):
        chart = BarChart("t", ("a", "b", "c"), (20, 50, 80), colours, True)
        problem, _, answer = _count(chart, np.random.default_rng(seed))
        limit = int(problem.rstrip("?").split()[-1])
        assert answer == str((limit < 20) + (limit < 50) + (limit < 80))


def test_a_chart_shows_its_values() -> None:
    chart = BarChart("t", ("a", "b", "c"), (5, 50, 95), ("#ff0000", "#00ff00", "#0000ff"), False)
    image = chart.draw()
    for channel, value in enumerate(chart.values):
        colour = np.eye(3, dtype=np.uint8)[channel] * 255
        rows, columns = np.nonzero((image == colour).all(axis=2))
        assert abs((rows.max() - rows.min()) / (_BOTTOM - _TOP) * 100 - value) < 1.5
        assert abs(columns.mean() - (_LEFT + (channel + 0.5) * (_RIGHT - _LEFT) / 3)) < 1.5


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [
        write_charts(tmp_path / name, train=3, val=0, test=0)["train"].read_bytes()
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
