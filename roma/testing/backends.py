"""`check_backend`: a function of your own in the place of a public one, held to the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roma.testing import compare_head, compare_logp, compare_whole
from roma.testing.candidate import on_device
from roma.testing.strategies import DTYPES, head_specs, loss_specs

Op = Literal["linear_logprob", "roma_loss", "roma_loss_from_logp"]


def check_backend(
    candidate: Callable[..., Any],
    *,
    op: Op = "linear_logprob",
    examples: int = 200,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str = "cpu",
    **fixed: Any,
) -> None:
    """Holds values and every gradient of `candidate` to the float64 oracle on drawn inputs.

    Inputs are of every kind that has bitten somebody: a vocabulary one past a block, peaked and
    uniform distributions, logits in the hundreds, masked rows that hold NaN, ties, log-ratios at a
    clip's edge. Each result has three numbers: the candidate, the oracle, and plain PyTorch in
    fp32; the candidate may be off by twice what plain PyTorch loses and four standard deviations of
    the rounding that any fp32 kernel must make (roma/testing/tolerance.py derives each bound).

    Args:
        candidate: takes the arguments of `roma.<op>` but `backend`, and returns what that returns:
            `roma.TokenLogprobs` or `roma.RomaLoss`.
        op: the public function in whose place it stands.
        examples: how many inputs to draw; the same ones every time.
        dtypes: of hidden states and weights.
        device: where the candidate gets its tensors; the oracle runs on the CPU.
        fixed: pins fields of `strategies.HeadSpec` (op "linear_logprob") or `strategies.LossSpec`,
            for what the candidate does not claim to do: `softcap=None`, `entropy=False`.

    Raises:
        AssertionError: a result is out of bounds; the message names it, and shows the smallest
            input that was found as one line that makes it again.

    Example:
        >>> import functools, roma
        >>> check_backend(functools.partial(roma.linear_logprob, backend="torch"), examples=5)
    """
    ops: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
        "linear_logprob": (head_specs, compare_head.check_against_oracle),
        "roma_loss": (loss_specs, compare_whole.check_against_oracle),
        "roma_loss_from_logp": (loss_specs, compare_logp.check_against_oracle),
    }
    drawn, compare = ops[op]
    function = candidate if device == "cpu" else on_device(candidate, device)
    specs = drawn(**fixed)
    if "dtype" not in fixed:
        specs = st.sampled_from(list(dtypes)).flatmap(lambda dtype: drawn(**fixed, dtype=dtype))

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,  # one AssertionError, not a group of them
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(spec=specs)
    def holds(spec: Any) -> None:
        compare(spec, function)

    holds()
