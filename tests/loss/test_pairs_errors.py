"""view_rows: what a wrong one gets, and what is not an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pairs import laid_out, needed
from support.refusals import DTYPE_ERRORS, B, D, K, T, refuse
from torch import Tensor

from roma import RomaConfig
from roma.testing import compare_whole
from roma.testing.strategies import LossSpec

SPEC = LossSpec(b=B, t=T, k=K, d=D)
ALL = torch.ones(K, B, dtype=torch.bool)
RIGHT = torch.tensor([True, False, True])


def call(backend: str, *, packed: bool = False, keep: Tensor = ALL, **changes: Any) -> Any:
    """A good call on pairs with some arguments changed."""
    case = LossSpec(b=B, t=T, k=K, d=D, packed=packed).make()
    return compare_whole.call(laid_out(case, keep, spare=1) | changes, backend)


def rows(value: int, *, at: tuple[int, int] = (1, 2), packed: bool = False) -> Tensor:
    """A good view_rows with one entry changed."""
    case = LossSpec(b=B, t=T, k=K, d=D, packed=packed).make()
    good = laid_out(case, ALL, spare=1)["view_rows"].clone()
    good[at] = value
    return good


def test_the_good_call(backend: str) -> None:
    for packed in (False, True):
        call(backend, packed=packed)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (torch.zeros(K, B + 1, dtype=torch.int64), f"[{K}, {B}]"),
        (torch.zeros(B, dtype=torch.int64), f"[{B}, {B}]"),
        (torch.zeros((), dtype=torch.int64), "[K, B]"),
        (torch.zeros(K, B, T, dtype=torch.int64), f"[{K}, {B}]"),
    ],
)
def test_shapes(wrong: Tensor, expected: str, backend: str) -> None:
    with refuse("view_rows", expected, str(list(wrong.shape))):
        call(backend, view_rows=wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(K, B, T, D), torch.zeros(4, T + 1, D)])
def test_shapes_of_the_states(wrong: Tensor, backend: str) -> None:
    """The dense form beside view_rows, or other lengths."""
    with refuse("view_hidden", "[R, T, D] (view_rows is given)", str(list(wrong.shape))):
        call(backend, view_hidden=wrong)
    with refuse("view_hidden", "[S, D] (view_rows is given)"):
        call(backend, packed=True, view_hidden=wrong)
    with refuse("view_hidden", "[K, B, T, D]"):
        call(backend, view_rows=None)


def test_kinds(backend: str) -> None:
    for dtype in (torch.int32, torch.float32, torch.bool):
        with refuse("view_rows", str(dtype).removeprefix("torch."), kind=DTYPE_ERRORS):
            call(backend, view_rows=torch.zeros(K, B).to(dtype))
    with refuse("view_rows", "list", kind=DTYPE_ERRORS):
        call(backend, view_rows=[[0] * B] * K)
    with refuse("view_rows", "cpu", "meta"):
        call(backend, view_rows=torch.zeros(K, B, dtype=torch.int64, device="meta"))
    with refuse("view_hidden", "bfloat16", kind=DTYPE_ERRORS):
        call(backend, view_hidden=torch.zeros(7, T, D).bfloat16())


@pytest.mark.parametrize("wrong", [-2, 7, 2**62])
def test_a_row_that_is_not_there(wrong: int, backend: str) -> None:
    """Seven rows: six pairs and one that nobody uses."""
    with refuse("view_rows", "7 rows", f"got {wrong} for view 1 of sequence 2"):
        call(backend, view_rows=rows(wrong))


def test_a_span_that_does_not_fit(backend: str) -> None:
    """Packed: the last position is the span's end, not its beginning."""
    case = laid_out(LossSpec(b=B, t=T, k=K, d=D, packed=True).make(), ALL, spare=1)
    size, length = len(case["view_hidden"]), int(case["cu_seqlens"].diff()[2])
    for wrong in (-2, size - length + 1, size, 2**62):
        with refuse("view_rows", f"{length} tokens", str(size), f"got {wrong} for view 1"):
            call(backend, packed=True, view_rows=rows(wrong, packed=True))


def test_a_row_used_twice(backend: str) -> None:
    """By another view of another sequence; −1 may come often."""
    good = rows(-1)
    taken = int(good[0, 0])
    with refuse("view_rows", f"{taken} for view 0 of sequence 0 and {taken} for view 1 of sequ"):
        call(backend, view_rows=rows(taken))


def test_spans_that_overlap(backend: str) -> None:
    """Packed: by one position; an empty sequence stands anywhere."""
    spec = LossSpec(b=B, t=T, k=K, d=D, packed=True, difficulty="row_all_masked")
    case = laid_out(spec.make(), ALL, spare=1)
    assert case["cu_seqlens"].tolist()[:2] == [0, 0]
    good = case["view_rows"].clone()
    good[:, 0] = 1
    compare_whole.call(case | {"view_rows": good}, backend)
    order = good[:, 1:].flatten().argsort()
    first, second = (divmod(int(x), B - 1) for x in order[:2])
    wrong = good.clone()
    wrong[second[0], second[1] + 1] -= 1
    assert int(wrong.min()) >= 0
    with refuse("view_rows", "of its own for each pair", f"sequence {first[1] + 1} and "):
        compare_whole.call(case | {"view_rows": wrong}, backend)


def test_the_sampled_view_is_there(backend: str) -> None:
    """Unless the advantage, or λ_aux, is 0, or no token counts."""
    keep = ALL.clone()
    keep[1, 2] = False
    draws = {"aux_view": torch.tensor([0, 1, 1]), "correct": ~RIGHT}
    gains = torch.tensor([1.0, -1.0, -0.5])
    with refuse("view_rows", "lambda_aux > 0", "−1 for aux_view = 1 of sequence 2"):
        call(backend, keep=keep, **draws, advantages=gains)
    by_token = gains[:, None].expand(B, T) * (torch.arange(T) == 0)  # the first always counts
    with refuse("view_rows", "aux_view = 1 of sequence 2"):
        call(backend, keep=keep, **draws, advantages=by_token)
    tensor = RomaConfig(lambda_aux=torch.tensor(0.5))
    with refuse("view_rows", "aux_view = 1 of sequence 2"):
        call(backend, keep=keep, **draws, advantages=gains, config=tensor)
    still = torch.tensor([1.0, -1.0, 0.0])
    call(backend, keep=keep, **draws, advantages=still)
    call(backend, keep=keep, **draws, advantages=still[:, None].expand(B, T))
    call(backend, keep=keep, **draws, advantages=gains, config=RomaConfig(lambda_aux=0))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2] = False
    call(backend, keep=keep, **draws, advantages=gains, mask=mask)


def test_a_right_sequence_has_a_view(backend: str) -> None:
    """Else it would have no penalty, without a word."""
    keep = ALL.clone()
    keep[:, 2] = False
    how: dict[str, Any] = {"keep": keep, "aux_view": None}
    with refuse("view_rows", "lambda_inv > 0", "−1 for all views of sequence 2"):
        call(backend, **how, correct=RIGHT)
    call(backend, **how, correct=~RIGHT)
    call(backend, **how, correct=RIGHT, config=RomaConfig(lambda_inv=0))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2] = False
    call(backend, **how, correct=RIGHT, mask=mask)
    with refuse("view_rows", "K ≥ 1", "K = 0"):
        call(backend, aux_view=None, view_rows=torch.zeros(0, B, dtype=torch.int64))
    with refuse("aux_view", "K = 0"):
        call(
            backend,
            view_rows=torch.zeros(0, B, dtype=torch.int64),
            config=RomaConfig(lambda_inv=0),
        )


def test_a_mean_is_over_all_views(backend: str) -> None:
    """Of right sequences; a wrong one may lack any."""
    keep, mean = ALL.clone(), RomaConfig(worst_over="mean")
    keep[1, 2] = False
    how: dict[str, Any] = {"keep": keep, "aux_view": None}
    with refuse("view_rows", 'worst_over = "mean"', "−1 for view 1 of sequence 2"):
        call(backend, **how, correct=RIGHT, config=mean)
    call(backend, **how, correct=~RIGHT, config=mean)
    call(backend, **how, correct=RIGHT)


def test_what_needed_pairs_lack_is_refused(backend: str) -> None:
    """Each pair that a trainer must run is one whose absence is noticed, if it was the last."""
    case = LossSpec(b=6, t=4, k=1).make()
    case["advantages"] = case["advantages"].masked_fill(torch.arange(6) < 4, 0.0)
    case["correct"] = torch.arange(6) < 2
    keep = needed(case)
    assert 0 < int(keep.sum()) < 6
    compare_whole.call(laid_out(case, keep), backend)
    for k, i in keep.nonzero().tolist():
        fewer = keep.clone()
        fewer[k, i] = False
        with refuse("view_rows", f"of sequence {i}"):
            compare_whole.call(laid_out(case, fewer), backend)
