"""linear_logprob: what need not be computed (MATH, section 6), counted and not timed."""

from __future__ import annotations

import compare_head
import pytest
import torch
from counting import Watch
from strategies import HeadSpec


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
    forward, back = compare_head.count_flops(kernel)
    assert compare_head.PRODUCT <= forward <= compare_head.SLACK * compare_head.PRODUCT
    assert 2 * compare_head.PRODUCT <= back <= compare_head.SLACK * 3 * compare_head.PRODUCT


def test_backward_costs_active_rows_only(kernel: str) -> None:
    """With an eighth of the rows active the backward costs an eighth."""
    _, dense = compare_head.count_flops(kernel)
    _, sparse = compare_head.count_flops(kernel, active=compare_head.ROWS // 8)
    assert 0 < sparse <= compare_head.SLACK * dense / 8


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_leaf_costs_no_product(frozen: str, kernel: str) -> None:
    """A frozen head costs no dW, a frozen body no dh: one product less."""
    _, both = compare_head.count_flops(kernel)
    _, one = compare_head.count_flops(kernel, frozen=(frozen,))
    assert one <= both - compare_head.PRODUCT / compare_head.SLACK


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
