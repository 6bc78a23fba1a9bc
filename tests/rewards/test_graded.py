"""Other ways to compare answers: exactly, and as mathematics; and the one door to all of them."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from roma.rewards import (
    Failed,
    JudgeReward,
    MathReward,
    ProcessReward,
    RewardError,
    compute_score,
    exact_score,
    make_reward,
)


def boxed(answer: str, truth: str = "8", **changes: Any) -> dict[str, Any]:
    response = rf"<think> so </think> \boxed{{{answer}}}"
    return {"id": "7", "response": response, "ground_truth": truth, **changes}


def test_a_boxed_truth_is_read_out_of_its_box() -> None:
    rows = [
        boxed("8", r"\boxed{8}"),
        boxed("8", r"\boxed{8} or 9"),
        boxed("17", r"\boxed{17^\circ}"),
    ]
    assert [score["accuracy"] for score in compute_score(rows)] == [1.0, 0.0, 1.0]
    assert [score["accuracy"] for score in exact_score(rows)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("row", "overall"),
    [
        (boxed("B", " B "), 1.0),
        (boxed("b", "B"), 0.1),
        (boxed("8.0"), 0.1),
        (boxed("8", finished=False), 0.0),
        ({"response": "B\n", "ground_truth": "B"}, 0.9),
        ({"response": "<think> A? </think> B", "ground_truth": "B"}, 0.9),
        ({"response": "It is B", "ground_truth": "B"}, 0.0),
        ({"response": "B", "ground_truth": "B", "finished": False}, 0.0),
        ({"response": r"\boxed{B}.", "ground_truth": "B"}, 0.0),
        ({"response": "", "ground_truth": "B"}, 0.0),
    ],
)
def test_exact(row: dict[str, Any], overall: float) -> None:
    assert exact_score([row])[0]["overall"] == pytest.approx(overall)


def test_exact_takes_what_is_cut_off_if_asked() -> None:
    rows = [{"response": "B", "ground_truth": "B", "finished": False}]
    assert exact_score(rows, strict_end=False)[0]["accuracy"] == 1.0


@pytest.fixture(scope="module")
def mathematics() -> Iterator[MathReward]:
    pytest.importorskip("math_verify")
    made = MathReward(timeout_s=5.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("17", r"\boxed{17^\circ}", True),
        ("2+3", "5", True),
        ("5 cm", "5", True),
        ("80", "8", False),
        ("3.14", r"\pi", False),
        ("salt", "last", False),  # to math-verify two products of the same letters
        ("Rice", "rice", True),
        ("", "8", False),
    ],
)
def test_mathematics(mathematics: MathReward, answer: str, truth: str, same: bool) -> None:
    (score,) = mathematics([boxed(answer, truth)])
    assert not isinstance(score, Failed)
    assert score == {"overall": 0.1 + 0.9 * same, "format": 1.0, "accuracy": float(same)}


def test_mathematics_reads_the_form_as_the_builtin_does(mathematics: MathReward) -> None:
    rows = [
        boxed("2+3", "5", finished=False),
        {"response": r"\boxed{2+3}", "ground_truth": "5"},
        {"response": "2+3", "ground_truth": "5"},
        {"response": r"<think> </think> \boxed{2+3}.", "ground_truth": "5"},
    ]
    scores = [dict(score) for score in mathematics(rows) if not isinstance(score, Failed)]
    assert [score["accuracy"] for score in scores] == [0.0, 1.0, 0.0, 0.0]
    assert [score["format"] for score in scores] == [0.0] * 4


def test_what_cannot_be_computed_is_cut_and_marked() -> None:
    """sympy would take the power of powers for hours; equal answers of a group are asked once."""
    pytest.importorskip("math_verify")
    reward = MathReward(timeout_s=1.0)
    endless = boxed("9^{9^{9^{9}}}", "5")
    begin = time.monotonic()
    first, *others, last = reward([boxed("2+3", "5"), *[endless] * 8, boxed("2+4", "6")])
    assert time.monotonic() - begin < 20  # 8 s and more if each were asked
    reasons = {score.reason if isinstance(score, Failed) else "scored" for score in others}
    assert reasons == {"took longer than 1 s"}
    for score in (first, last):
        assert not isinstance(score, Failed) and score["accuracy"] == 1.0
    reward.close()


# ---- the door


@dataclass
class Judge:
    url: str | None = None
    model: str | None = None
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 60.0
    retries: int = 2
    prompt: str | None = None


@dataclass
class Options:
    function: str = "builtin"
    format_weight: float = 0.25
    strict_end: bool = True
    timeout_s: float = 10.0
    on_error: str = "mark"
    judge: Judge = field(default_factory=Judge)


def test_every_name_has_its_reward(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def f(rows): return [dict(overall=2, format=0, accuracy=0)] * len(rows)")
    rows = [boxed("9")]
    for function in ("builtin", "exact"):
        assert make_reward(Options(function))(rows)[0] == {
            "overall": 0.25,
            "format": 1.0,
            "accuracy": 0.0,
        }
    made = make_reward(Options(f"{own}:f"))
    assert isinstance(made, ProcessReward) and made.timeout_s == 10
    assert made(rows) == [{"overall": 2.0, "format": 0.0, "accuracy": 0.0}]
    made.close()
    judge = make_reward(Options("judge", judge=Judge(url="http://localhost:1/v1", model="m")))
    assert isinstance(judge, JudgeReward) and judge.format_weight == 0.25


def test_stop_raises_where_mark_would_mark(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def f(rows): return [dict(overall=1/0, format=0, accuracy=0)] * len(rows)")
    with pytest.raises(RewardError, match=r"reward of row 7: .*ZeroDivisionError.*on_error=mark"):
        make_reward(Options(f"{own}:f", on_error="stop"))([boxed("8")])
    (score,) = make_reward(Options(f"{own}:f"))([boxed("8")])
    assert isinstance(score, Failed)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"worker\.reward\.function: .*got 'maths'; did you mean"):
        make_reward(Options("maths"))
    with pytest.raises(ValueError, match=r"worker\.reward\.judge\.url: expected the http"):
        make_reward(Options("judge"))
    with pytest.raises(ValueError, match=r"worker\.reward\.judge\.model: expected"):
        make_reward(Options("judge", judge=Judge(url="http://localhost:1")))
    missing = Judge(url="http://localhost:1", model="m", prompt="none.txt")
    with pytest.raises(FileNotFoundError, match=r"worker\.reward\.judge\.prompt: .*none\.txt"):
        make_reward(Options("judge", judge=missing))


def test_without_math_verify_the_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        make_reward(Options("math"))
