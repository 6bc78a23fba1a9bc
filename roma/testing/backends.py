"""`check_backend`: a function of your own in place of a public one, held to the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from roma.testing import compare_head, compare_logp, compare_whole
from roma.testing.candidate import on_device
from roma.testing.matrix_unit import matrix_unit
from roma.testing.strategies import (
    DTYPES,
    HEAD_DIFFICULTIES,
    LOSS_DIFFICULTIES,
    HeadSpec,
    LossSpec,
    head_specs,
    loss_specs,
)
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.api import TokenLogprobs
from roma_kernels.roma_loss.api import RomaLoss
from roma_kernels.roma_loss.config import RomaConfig, WorstOver

Op = Literal["linear_logprob", "roma_loss", "roma_loss_from_logp"]

# Equal views under every rule for the worst one: of a tie the lowest index counts.
_TIES = [
    LossSpec(k=4, difficulty=difficulty, config=RomaConfig(worst_over=worst_over), aux=False)
    for worst_over in get_args(WorstOver)
    for difficulty in ("views_identical", "views_equal_clean")
]


def check_backend(
    candidate: Callable[..., Any],
    *,
    op: Op = "linear_logprob",
    examples: int = 200,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str = "cpu",
    **fixed: Any,
) -> None:
    """Holds values, metrics and gradients of `candidate` to the float64 oracle on drawn inputs.

    Inputs are of every kind that has broken a known kernel: a vocabulary one past a block, peaked
    and uniform distributions, logits in the hundreds, masked rows that hold NaN, ties, log-ratios
    at a clip's edge. Each result has three numbers: the candidate, the oracle, and plain PyTorch in
    fp32; the candidate may be off by twice what plain PyTorch loses and four standard deviations of
    the rounding that any fp32 kernel must make (roma/testing/tolerance.py derives each bound). A
    GPU's matrix units cut off the sums of bf16 and fp16 products; there the bounds know by how much
    (roma/testing/matrix_unit.py).

    Args:
        candidate: takes the arguments of `roma.<op>` but `backend`, and returns what that returns:
            `roma.TokenLogprobs` or `roma.RomaLoss`.
        op: the public function whose place it takes.
        examples: how many inputs to draw; the same ones every time.
        dtypes: of hidden states and weights.
        device: where the candidate gets its tensors; the oracle runs on the CPU.
        fixed: pins fields of `strategies.HeadSpec` (op "linear_logprob") or `strategies.LossSpec`,
            for what the candidate does not claim to do: `softcap=None`, `entropy=False`.

    Raises:
        AssertionError: a result is out of bounds; the message names it, and a note shows the
            smallest input that was found, as one line that makes it again: `HeadSpec(…).make()`
            gives the arguments of linear_logprob, `LossSpec(…).make()` those of roma_loss and
            `.make_logp()` those of roma_loss_from_logp (`from roma.testing.strategies import …`).
        ValueError: an unknown op, field or value of a field.

    Example:
        >>> import functools, roma
        >>> check_backend(functools.partial(roma.linear_logprob, backend="torch"), examples=5)
    """
    if op not in get_args(Op):
        fail("op", "one of " + ", ".join(map(repr, get_args(Op))), repr(op), "correct it")
    if not callable(candidate):
        fail("candidate", "a function", repr(candidate), "for a back end: functools.partial")
    head = op == "linear_logprob"
    _check_fixed(HeadSpec if head else LossSpec, fixed)
    unit = matrix_unit(device)
    comparisons: dict[str, Callable[..., None]] = {
        "linear_logprob": partial(compare_head.check_against_oracle, unit=unit),
        "roma_loss": partial(compare_whole.check_against_oracle, unit=unit),
        "roma_loss_from_logp": compare_logp.check_against_oracle,
    }
    drawn: Callable[..., st.SearchStrategy[Any]] = head_specs if head else loss_specs
    function = candidate if device == "cpu" else on_device(candidate, device)
    returns = TokenLogprobs if head else RomaLoss
    pinned = dict(fixed)
    if isinstance(fixed.get("config"), RomaConfig):
        pinned["config"] = st.just(fixed["config"])
    specs = drawn(**pinned)
    if "dtype" not in fixed:
        specs = st.sampled_from(list(dtypes)).flatmap(lambda dtype: drawn(**pinned, dtype=dtype))

    def typed(*tensors: Any, **options: Any) -> Any:
        found = function(*tensors, **options)
        assert isinstance(found, returns), f"{op}: expected a {returns.__name__}, got {found!r:.60}"
        return found

    def holds(spec: Any) -> None:
        comparisons[op](spec, typed)

    test = given(spec=specs)(holds)
    pins_a_tie = {"k", "difficulty", "config", "aux"} & fixed.keys()
    for tie in () if head or pins_a_tie else _TIES:
        test = example(spec=replace(tie, **{"dtype": dtypes[0], **fixed}))(test)
    settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,  # one AssertionError, not a group of them
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )(test)()


def _check_fixed(spec: type, fixed: dict[str, Any]) -> None:
    """Pinned fields exist, and their values can be made."""
    known = [field.name for field in fields(spec)]
    choices: dict[str, tuple[str, ...]] = (
        {"temperature": ("one", "float", "rows")} if spec is HeadSpec else {}
    )
    choices["difficulty"] = HEAD_DIFFICULTIES if spec is HeadSpec else LOSS_DIFFICULTIES
    if spec is LossSpec:
        choices |= {"totals": ("own", "number", "tensor"), "head_difficulty": HEAD_DIFFICULTIES}
        choices["weights"] = ("none", "sequence", "token")
    for name, value in fixed.items():
        if name not in known:
            fail(name, f"a field of {spec.__name__}", "an unknown one", f"it has {known}")
        if name in choices and value not in choices[name]:
            expected = "one of " + ", ".join(map(repr, choices[name]))
            fail(f"{spec.__name__}.{name}", expected, repr(value), "pin one of them")
