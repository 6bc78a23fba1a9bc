"""How `make gpu` divides its steps into calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gpu import budget, steps
from bench.gpu.budget import Part, Step


def test_calls_are_filled_in_order_and_none_is_too_long() -> None:
    made = [
        Step("a", "", (Part("1", (), 25, 100), Part("2", (), 300, 400))),
        Step("b", "", (Part("3", (), 400, 1600, least=60), Part("4", (), 20, 30))),
        Step("c", "", (Part("5", (), 1, 1, absent="needs a card"),)),
    ]
    calls = budget.calls(made, 570)
    names = [[name for _, name, _ in call] for call in calls]
    assert names == [["1", "2", "3"], ["3", "4"]]
    first = 570 - budget.START - 25 - 300 - 3 * budget.PACK
    assert calls[0][2][2] == first and calls[1][0][2] == 400 - first


def test_a_part_waits_for_the_one_that_it_needs() -> None:
    made = [Step("a", "", (Part("x", (), 50, 60), Part("hold", (), 300, 400),
                           Part("time", (), 40, 50, after="hold")))]  # fmt: skip
    assert [[name for _, name, _ in call] for call in budget.calls(made, 330)] == [
        ["x"],
        ["hold"],
        ["time"],
    ]


def test_a_call_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match=r"--call-minutes: .* needs 0\.58, got 0\.50"):
        budget.calls([Step("a", "", (Part("1", (), 25, 100),))], 30)


_PARTS = st.lists(
    st.tuples(st.sampled_from([1, 20, 45, 90, 300]), st.sampled_from([None, 10, 60])), max_size=12
)


@given(_PARTS, st.sampled_from([310, 600, 5000]))
def test_every_second_is_planned_once(sizes: list[tuple[int, int | None]], seconds: int) -> None:
    made = [Step("s", "", tuple(
        Part(str(i), (), expect, 2 * expect, least=least)
        for i, (expect, least) in enumerate(sizes)
    ))]  # fmt: skip
    calls = budget.calls(made, seconds + budget.START + budget.PACK)
    given_: dict[str, float] = {}
    for call in calls:
        total = budget.START + sum(used + budget.PACK for *_, used in call)
        assert total <= seconds + budget.START + budget.PACK + 1e-9
        for _, name, used in call:
            given_[name] = given_.get(name, 0.0) + used
    # A part that can be interrupted gets no less than `least`, also for its last second.
    for i, (expect, least) in enumerate(sizes):
        assert expect <= given_[str(i)] <= max(expect, least or 0) + (least or 0)


def test_the_steps_of_a_card() -> None:
    """The order of the ticket; everything fits calls of ten minutes; the first has what decides."""
    card = steps.Machine(
        "cuda", (9, 0), frozenset({"torch", "triton", "pytest", "hypothesis"}), frozenset({"ncu"})
    )
    made = steps.steps(card, Path("out"))
    assert [step.name for step in made] == steps.names()
    calls = budget.calls(made, 570)
    first = [(step, name) for step, name, _ in calls[0]]
    assert first[:6] == [
        ("facts", "card"),
        *(("correct", plan) for plan in ("triton", "vendor", "gluon", "torch")),
        ("decisive", "card"),
    ]
    absent = {f"{s.name}, {p.name}": p.absent for s in made for p in s.parts if p.absent}
    assert absent["sanitizer, memcheck, triton"] == "compute-sanitizer is not on the PATH"
    assert absent["fallback, triton"] == "pytest is here"
    other = steps.steps(steps.Machine("cuda", (8, 0), frozenset({"torch"})), Path("out"))
    reasons = {f"{s.name}, {p.name}": p.absent for s in other for p in s.parts}
    assert reasons["correct, triton"] == "not installed: triton"
    assert reasons["correct, gluon"] == "its kernels are for sm_90"
    assert reasons["tests, pytest"] == "not installed: pytest, hypothesis"
    assert reasons["correct, torch"] == ""
