"""The rules of `roma bench-vlm --judge rules`, against answers read by hand."""

from collections.abc import Iterator

import pytest

from roma.evaluate.lmms_eval.rules import (
    Answered,
    Rules,
    final_answer,
    near_number,
    options_of,
    same_option,
)


@pytest.mark.parametrize(
    ("response", "final"),
    [
        (r"<think> \boxed{3} </think> So \boxed{\frac{1}{2}} it is.", r"\frac{1}{2}"),
        ("<analysis> a </analysis>\n<answer> B. red </answer>", "B. red"),
        ("<answer>A</answer> no: <answer>C</answer>", "C"),
        ("The answer is 5? No.\nThe final answer is: **B**.", "B"),
        ("Answer: (B)", "(B)"),
        ("**Answer:** $B$", "$B$"),
        ("Let me see.\n\n  Rome.  \n", "Rome"),
        ("", ""),
        ("<think> It is 3, so the answer is 3", ""),  # cut off while it reasons
        (r"<think> It is \boxed{3}", "3"),
        ("<think> It is 3 </think>", ""),
    ],
)
def test_the_final_answer(response: str, final: str) -> None:
    assert final_answer(response) == final


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("Which?\n(A) red\n(B) dark red\nSay the letter.", {"A": "red", "B": "dark red"}),
        ("Which? Options: A: 3 cm, B: 4 cm", {"A": "3 cm", "B": "4 cm"}),
        ("A. 2; B. 3; C. None of these", {"A": "2", "B": "3", "C": "None of these"}),
        ("As (A) 1 (B) 2.\nNow:\n(A) 7\n(B) 8", {"A": "7", "B": "8"}),
        ("Is vitamin A: good?", {}),
        ("What is f(A) for B?", {}),
    ],
)
def test_the_options_of_a_question(problem: str, options: dict[str, str]) -> None:
    assert options_of(problem) == options


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("B", "B", True),
        ("(b)", "B", True),
        ("b", "B", True),
        (r"\text{B}", "B", True),
        ("$B$", "B", True),
        ("Option B.", "B", True),
        ("B. dark red", "B", True),
        ("B) it is the dark one", "B", True),
        ("dark red", "B", True),
        ("Dark Red", "B", True),
        ("B", "dark red", True),
        ("A", "B", False),
        ("red", "B", False),
        ("B. red", "B", False),  # which of the two is meant?
        ("A dark red", "A", False),
        ("C", "B", False),
        ("", "B", False),
        ("A or B", "B", False),
    ],
)
def test_an_option_by_its_letter_or_its_text(answer: str, truth: str, same: bool) -> None:
    assert same_option(answer, truth, {"A": "red", "B": "dark red"}) is same


@pytest.mark.parametrize(
    ("answer", "truth", "tolerance", "near"),
    [
        ("3.14159", "3.14", 0.0, True),
        ("3.1", "3.14", 0.0, False),
        ("3.145", "3.14", 0.0, True),  # the half itself
        ("3.2", "3", 0.0, False),  # no decimals: exactly
        ("5 cm", "5", 0.0, True),
        ("$1,000", "1000", 0.0, True),
        ("-3", "3", 0.0, False),
        ("105", "100", 0.05, True),
        ("105.1", "100", 0.05, False),
        ("-105", "-100", 0.05, True),
        ("cm", "5", 0.0, False),
        ("5", "cm", 0.05, False),
        ("1 2", "12", 0.0, False),
        ("", "0", 0.05, False),
    ],
)
def test_numbers(answer: str, truth: str, tolerance: float, near: bool) -> None:
    assert near_number(answer, truth, tolerance) is near


@pytest.fixture(scope="module")
def rules() -> Iterator[Rules]:
    made = Rules()
    yield made
    made.close()


def test_answers_of_every_kind(rules: Rules) -> None:
    """The words that some tasks' own rules take for one another, and what these misread."""
    city = "Which city?"
    choice = "Which?\nA. yes\nB. no"
    rows: list[tuple[str, tuple[str, ...], str, bool]] = [
        (city, ("Green",), "<answer>Grey</answer>", False),
        (city, ("Berlin",), r"\boxed{Boston}", False),
        (city, ("yes",), "<answer>Yes</answer>", True),
        (choice, ("a",), "<answer>A</answer>", True),
        (choice, ("A",), r"<think> B? </think> \boxed{\text{yes}}", True),
        (choice, ("no",), "Answer: B", True),
        (choice, ("a",), "It could be A or B", False),
        ("x?", ("x^2+2x+1",), r"\boxed{(x+1)^2}", True),  # math-verify's
        ("x?", ("x^2+2x+1",), r"\boxed{(x+2)^2}", False),
        ("x?", ("7", "8"), "8", True),
        ("x?", ("",), "", False),
    ]
    found = rules.right([Answered(problem, truths, said) for problem, truths, said, _ in rows])
    assert found == [right for *_, right in rows]


def test_chartqa_is_relaxed_and_others_are_not(rules: Rules) -> None:
    asked = [Answered("How much?", ("100",), "<answer>104</answer>")]
    assert rules.right(asked) == [False]
    assert rules.right(asked, tolerance=0.05) == [True]
