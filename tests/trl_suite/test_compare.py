"""What the comparison of two runs calls a loss, and what it lets pass."""

from typing import Any

import pytest
from trl_suite.run import compare, difference, table


def told(outcome: str = "passed", *logged: dict[str, Any], why: str = "") -> dict[str, Any]:
    """A test's record."""
    return {"outcome": outcome, "seconds": 1.0, "why": why, "logged": list(logged)}


@pytest.mark.parametrize("outcome", ["passed", "xfailed"])
def test_what_passes_with_both_is_no_loss(outcome: str):
    """Also an expected failure that stays one."""
    assert compare({"a": told(outcome)}, {"a": told(outcome)}, numbers=True) == []


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_what_passes_with_theirs_alone_is_a_loss(outcome: str):
    """Skipping is no way out."""
    lost = compare({"a": told()}, {"a": told(outcome, why="boom")}, numbers=False)
    assert lost == [f"a: {outcome}: boom"]


def test_what_was_not_run_is_a_loss():
    """A test that vanished did not pass."""
    assert compare({"a": told()}, {}, numbers=False) == ["a: not run: "]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_what_does_not_pass_with_theirs_is_not_held_against_the_other(outcome: str):
    """Neither is a number that it logged."""
    theirs, ours = told(outcome, {"loss": 1.0}), told("failed", {"loss": 2.0})
    assert compare({"a": theirs}, {"a": ours}, numbers=True) == []


def test_the_last_bit_of_a_number_counts():
    """And is not looked at where numbers may differ."""
    theirs, ours = told("passed", {"loss": 1.0}), told("passed", {"loss": 1.0 + 2**-52})
    assert len(compare({"a": theirs}, {"a": ours}, numbers=True)) == 1
    assert compare({"a": theirs}, {"a": ours}, numbers=False) == []


def test_a_number_too_few_or_too_many_is_a_difference():
    """In an entry of the log, or a whole entry."""
    assert difference([{"loss": 1.0}], []) == "logged 1 times with TRL's, 0 times with the other"
    assert difference([{"loss": 1.0}], [{"loss": 1.0, "more": 2.0}])
    assert difference([{"loss": 1.0, "more": 2.0}], [{"loss": 1.0}])
    assert difference([{"loss": 1.0}], [{"loss": 1.0}]) == ""


def test_the_table_counts_and_names_what_fails():
    """A line for each trainer; the reasons of what TRL's own did not pass."""
    stock = {"a": told("passed", {"loss": 1.0}), "b": told("failed", why="no GPU")}
    lines = table({"stock": stock, "off": {"a": told(), "b": told("failed")}}).splitlines()
    assert lines[1].split() == ["stock", "1", "1", "0", "0", "2"]
    assert lines[2].split() == ["off", "1", "1", "0", "0", "2"]
    assert lines[-1].strip() == "fails with TRL's: b: no GPU"
