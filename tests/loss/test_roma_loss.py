"""The whole of roma_loss, from hidden states to every gradient, padded and packed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import compare_whole, strategies, tolerance
from roma.testing.strategies import LossSpec, loss_specs


@given(spec=loss_specs())
@example(
    spec=LossSpec(
        v=129, k=4, packed=True, difficulty="nan_when_masked", bias=True, dtype=torch.bfloat16
    )
)
@example(
    spec=LossSpec(
        v=127, head_difficulty="peaked_tail", config=RomaConfig(softcap=5.0, temperature=0.7)
    )
)
def test_values_and_gradients(spec: LossSpec, backend: str) -> None:
    """Every option, dtype, form and difficulty."""
    compare_whole.check_against_oracle(spec, backend)


@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_worst_over_by_dtype(
    worst_over: str, dtype: torch.dtype, packed: bool, backend: str
) -> None:
    """The grid that a Hypothesis run may miss, at a size with several sequences and views."""
    config = RomaConfig(worst_over=worst_over, ref_coef=0.05)
    for seed in range(3):
        spec = LossSpec(
            b=4, t=6, k=3, seed=seed, packed=packed, config=config, dtype=dtype, v=129, bias=True
        )
        compare_whole.check_against_oracle(spec, backend)


@given(
    spec=loss_specs(dtype=torch.float32, bias=True, difficulty="plain"),
    frozen=st.sampled_from(
        [("weight",), ("hidden",), ("view_hidden",), ("hidden", "view_hidden"), ("weight", "bias")]
    ),
)
def test_frozen_parts(spec: LossSpec, frozen: tuple[str, ...], backend: str) -> None:
    """A frozen argument gets no gradient, and the others' do not change."""
    compare_whole.check_against_oracle(spec, backend, frozen)


def test_signatures_are_the_contract() -> None:
    """Names, order and what may be passed by position: DESIGN.md, "Public interface"."""
    shared = (
        "mask advantages correct old_logp ref_logp aux_view view_old_logp rollout_weight "
        "cu_seqlens total_sequences total_tokens total_correct config backend"
    ).split()
    head = ["vocab_group", "workspace"]
    expected = {
        roma.linear_logprob: (
            ["hidden", "weight", "tokens"],
            ["bias", "temperature", "softcap", "entropy", *head, "backend"],
        ),
        roma.roma_loss: (
            ["hidden", "view_hidden", "weight", "tokens"],
            ["bias", "view_rows", *head, *shared],
        ),
        roma.roma_loss_from_logp: (["logp", "view_logp"], ["entropy", *shared]),
    }
    for function, (positional, named) in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(named)
    got = compare_whole.call(LossSpec().make(), "reference")
    assert [
        n for n in ("loss", "logp", "view_logp", "worst_view", "metrics") if hasattr(got, n)
    ] == list(got._fields)


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_planted_gradient_errors_are_refused(dtype: torch.dtype) -> None:
    """A term left out, another view, a missing 1/τ: the comparator refuses the dW of each."""
    config = RomaConfig(temperature=0.7)
    spec = LossSpec(b=6, t=8, k=3, dtype=dtype, v=129, config=config, seed=1)
    case = spec.make()

    def dweight(of: dict[str, Any], kind: torch.dtype, **how: Any) -> Tensor:
        leaves = compare_whole.on_leaves(of, kind)
        return torch.autograd.grad(
            compare_whole.expect(leaves, dtype=kind, **how).loss, leaves["weight"]
        )[0]

    want, eager = dweight(case, torch.float64), dweight(case, torch.float32)
    wrong = {
        "no auxiliary loss": {"aux_view": None},
        "another view": {"aux_view": (case["aux_view"] + 1) % 3},
        "1/τ forgotten": {"config": replace(config, temperature=1.0)},
        "wrong rollouts penalised": {"correct": torch.ones(6, dtype=torch.bool)},
        "the other direction": {"config": replace(config, penalty_ratio="clean/view")},
    }
    for name, change in wrong.items():
        other = dweight(case | change, torch.float64).to(dtype)
        assert tolerance.refuses(name, other, want, eager, dtype=dtype), name
