"""Errors that one could make with shared prompts are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from support import prefix
from support.prefix import Case, Score
from torch import Tensor

from roma.models.prefix import Group, Packed
from roma.models.prefix import attention as prefix_attention
from roma.models.qwen_vl import Policy

EXACT, FOUND = 1e-12, 1e-3  # of a gradient's norm; 4e-15 and, the smallest, 2e-2 were measured


class Known(NamedTuple):
    policy: Policy
    case: Case
    rows: Score


@pytest.fixture(scope="module")
def known() -> Iterator[Known]:
    """A Qwen3-VL in fp64: two prompts with an image of one size each, three variants of these."""
    path = prefix.vision_folder("qwen3")
    policy, plain = Policy.load(path).double(), prefix.plain(path).double()
    case = prefix.image_case(policy, "equal", "views", "full", 2)
    case = case._replace(groups=sorted(case.groups, key=lambda g: -len(g.rollouts)))
    with prefix.exact(policy, plain):
        yield Known(policy, case, prefix.rows(plain, case))


def test_no_error_without_one(known: Known) -> None:
    assert prefix.packed(known.policy, known.case).off(known.rows)[1] <= EXACT


def test_a_position_off_by_one(known: Known) -> None:
    assert prefix.packed(known.policy, prefix.later(known.case)).off(known.rows)[1] > FOUND


def test_images_in_another_order(known: Known) -> None:
    order = known.case.groups[::-1]
    assert [g.variant for g in order] != [g.variant for g in known.case.groups]
    states, row = prefix.states_of(known.policy, known.case, order)
    found = prefix.scored(known.policy.model, known.case, states[row.reads(known.case.pairs)])
    assert found.off(known.rows)[1] > FOUND


def rolled(row: Packed, groups: list[Group]) -> Packed:
    return replace(row, before=np.roll(row.before, len(groups[0].rollouts)))


def first_of_rollouts(row: Packed, groups: list[Group]) -> Packed:
    return replace(row, starts=np.roll(row.starts, 1))


@pytest.mark.parametrize("change", [rolled, first_of_rollouts])
def test_states_of_another(known: Known, change: Callable[[Packed, list[Group]], Packed]) -> None:
    """The last state of another group's prompt; the states of the completion beside it."""
    states, row = prefix.states_of(known.policy, known.case)
    reads = change(row, known.case.groups).reads(known.case.pairs)
    found = prefix.scored(known.policy.model, known.case, states[reads])
    assert found.off(known.rows)[1] > FOUND


# Of the first group: where its prompt ends, and where its second completion begins.
SIGHTS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "a completion sees a later one": lambda prompt, second: (prompt, second),
    "a completion sees an earlier one": lambda prompt, second: (second, second - 1),
    "a prompt sees a completion": lambda prompt, second: (prompt - 1, prompt),
    "a completion sees the next group": lambda prompt, second: (second, -1),
    "a group sees the one before it": lambda prompt, second: (-1, 0),
}


def attend_by(seen: Tensor, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prefix_attention, "_by_shape", prefix.by_mask(seen))


def test_the_mask_that_is_meant(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_by(prefix.seen_in(known.case), monkeypatch)
    assert prefix.packed(known.policy, known.case).off(known.rows)[1] <= EXACT


@pytest.mark.parametrize("sight", SIGHTS)
def test_one_sight_too_many(known: Known, sight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, group = prefix.seen_in(known.case), known.case.groups[0]
    prompt = len(known.case.prompts[group.prompt])
    second = prompt + int(known.case.lengths[group.rollouts[0]]) - 1
    where = SIGHTS[sight](prompt, second)
    assert not seen[where]
    seen[where] = True
    attend_by(seen, monkeypatch)
    assert prefix.packed(known.policy, known.case).off(known.rows)[1] > FOUND


def test_one_sight_too_few(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last completion does not see its prompt's first token."""
    seen = prefix.seen_in(known.case)
    first = int(seen[-1].nonzero()[0])
    seen[-1, first] = False
    attend_by(seen, monkeypatch)
    assert prefix.packed(known.policy, known.case).off(known.rows)[1] > FOUND
