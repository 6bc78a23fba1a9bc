"""linear_logprob: what need not be computed (MATH, section 6), counted and not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.counting import Watch
from torch import Tensor

from roma.testing import compare_head, compare_logp, compare_whole, count_products
from roma.testing.strategies import HeadSpec, LossSpec

# An eighth of the rows is a whole block of every kernel.
ROWS, D, V = 1024, 16, 1024
PRODUCT = 2 * ROWS * D * V
# A product may be done in chunks of any size; nothing but whole products is counted.
SLACK = 1.05
# Rows of zeros that a kernel may add to fill its vectors (12 to 32, by instruction set).
FILL = {"torch": 0, "triton": 0, "native": 32}


def count_flops(
    backend: str, *, active: int = ROWS, frozen: tuple[str, ...] = ()
) -> tuple[int, int]:
    """FLOP of the products of forward and of backward."""
    spec = HeadSpec(shape=(ROWS,), d=D, v=V)
    with count_products() as forward:
        out, _ = compare_head.call(spec.make(), spec, backend, frozen=frozen)
    upstream = torch.zeros(ROWS)
    upstream[:: ROWS // active] = 1.0
    with count_products() as back:
        out.logp.backward(upstream)
    return forward.flop, back.flop


def test_non_finite_rows_without_upstream_do_not_leak(kernel: str) -> None:
    """A row whose upstream is 0 contributes nothing, even if its hidden state overflowed."""
    spec = HeadSpec(shape=(5,), v=33)
    inputs = spec.make()
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5])
    poisoned = inputs["hidden"].clone()
    poisoned[1], poisoned[3] = float("inf"), float("nan")
    got, leaves = compare_head.call(inputs | {"hidden": poisoned}, spec, kernel)
    clean, clean_leaves = compare_head.call(inputs, spec, kernel)
    got.logp.backward(upstream)
    clean.logp.backward(upstream)
    assert torch.equal(leaves["weight"].grad, clean_leaves["weight"].grad)
    assert torch.equal(leaves["hidden"].grad, clean_leaves["hidden"].grad)


def test_dense_cost(kernel: str) -> None:
    """One product forward, at most three backward (one of them the recompute)."""
    forward, back = count_flops(kernel)
    assert PRODUCT <= forward <= SLACK * PRODUCT
    assert 2 * PRODUCT <= back <= SLACK * 3 * PRODUCT


def test_the_count_is_honest(kernel: str) -> None:
    """What PyTorch's own products do is what was reported of them."""
    spec = HeadSpec(shape=(ROWS,), d=D, v=V)
    with count_products() as count, Watch() as watch:
        out, _ = compare_head.call(spec.make(), spec, kernel)
        out.logp.backward(torch.ones(ROWS))
    # What PyTorch multiplies; the others are products of a kernel.
    purposes = {
        "torch": ("forward", "recompute", "dhidden", "dweight"),
        "triton": ("dhidden", "dweight"),
        "native": (),
    }[kernel]
    assert watch.products == sum(PRODUCT * count.rows(p, V) / ROWS for p in purposes)
    assert 0 <= count.flop - 4 * PRODUCT <= 2 * FILL[kernel] * PRODUCT / ROWS


def test_backward_costs_active_rows_only(kernel: str) -> None:
    """With an eighth of the rows active the backward costs an eighth."""
    _, dense = count_flops(kernel)
    _, sparse = count_flops(kernel, active=ROWS // 8)
    assert 0 < sparse <= SLACK * dense / 8 + FILL[kernel] * PRODUCT / ROWS


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_leaf_costs_no_product(frozen: str, kernel: str) -> None:
    """A frozen head costs no dW, a frozen body no dh: one product less."""
    _, both = count_flops(kernel)
    _, one = count_flops(kernel, frozen=(frozen,))
    assert one <= both - PRODUCT / SLACK


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_roma_loss_multiplies_rows_with_a_gradient_only(right: float, kernel: str) -> None:
    """K = 4, worst view of a sequence: the backward's rows are those with a coefficient.

    Beyond them a kernel may fill one block of rows per view.
    """
    b, t, k = 8, 32, 4
    spec = LossSpec(b=b, t=t, k=k, d=D, v=257, seed=5)
    case = compare_whole.on_leaves(spec.make())
    case["correct"] = torch.arange(b) < right * b
    logp_case = compare_logp.on_leaves(
        {**case, **{n: x for n, x in _logps(case).items()}}  # the same batch by its log-probs
    )
    for name in ("hidden", "view_hidden", "weight", "bias", "tokens"):
        logp_case.pop(name, None)
    compare_logp.call(logp_case, "reference").loss.backward()
    active = sum(int((logp_case[name].grad != 0).sum()) for name in compare_logp.LOGPS)
    counted = int(case["mask"].sum())
    with count_products() as count:
        loss = compare_whole.call(case, kernel).loss
        assert counted * (k + 1) <= count.rows("forward", 257) <= counted * (k + 1) + 128
        loss.backward()
    block = {"triton": 128, "native": 32, "torch": 0}[kernel]
    for purpose in ("recompute", "dhidden", "dweight"):
        assert active <= count.rows(purpose, 257) <= active + block * (k + 1), purpose
    assert 0 < active <= 3 * counted  # the clean row, the sampled view, the worst view


def _logps(case: dict[str, Any]) -> dict[str, Tensor]:
    out = compare_whole.call(case, "reference")
    return {"logp": out.logp, "view_logp": out.view_logp}


def test_logits_stay_in_a_bounded_workspace(kernel: str) -> None:
    """512 rows by a vocabulary of 151,936 would be 297 MiB of float32 logits.

    No tensor may come near.
    """
    spec = HeadSpec(shape=(512,), d=2, v=151_936, dtype=torch.bfloat16)
    inputs = spec.make()
    with Watch() as watch:
        out, _ = compare_head.call(inputs, spec, kernel)
        upstream = torch.zeros(512)
        upstream[::8] = 1.0
        out.logp.backward(upstream)
    # An eighth of the logits in float32, 37 MiB: several such tensors still leave room below the
    # bar of 400 MiB.
    assert watch.largest <= 512 * 151_936 / 8


def test_no_row_active_costs_nothing(backend: str) -> None:
    """All upstreams 0: gradients are zeros, not None and not NaN."""
    spec = HeadSpec(bias=True)
    got, leaves = compare_head.call(spec.make(), spec, backend)
    got.logp.backward(torch.zeros(5))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name
