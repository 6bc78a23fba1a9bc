"""Every public function on a card, held to the float64 oracle on drawn inputs.

Options are pinned, all off or all on, where each set of them would be compiled anew.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from support import card

from roma.testing import check_backend, compare_head, compare_whole
from roma.testing.matrix_unit import matrix_unit
from roma.testing.strategies import HeadSpec, LossSpec
from roma_kernels.linear_logprob.triton.tuning import PLANS, copyable, tile_for

HALF = (torch.bfloat16, torch.float16)
OPTIONS = {
    "bare": {"bias": False, "softcap": None, "temperature": "one", "entropy": False},
    "all options": {"bias": True, "softcap": 5.0, "temperature": "rows", "entropy": True},
}
# What gluon takes, beside the bare head.
ENTROPY = {"entropy": OPTIONS["all options"] | {"bias": False, "softcap": None}}


def examples(device: str, number: int) -> int:
    return number if device == "cuda" else 8


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, "bare"),
        (torch.bfloat16, "all options"),
        (torch.float16, "all options"),
        (torch.float32, "all options"),
    ],
)
def test_linear_logprob(dtype: torch.dtype, options: str, device: str) -> None:
    function = functools.partial(card.PUBLIC["linear_logprob"], backend="triton")
    number = examples(device, 40)
    check_backend(function, dtypes=[dtype], device=device, examples=number, **OPTIONS[options])


@pytest.mark.parametrize(
    ("plan", "options"),
    [("vendor", "bare"), ("vendor", "all options"), ("gluon", "bare")],
    indirect=["plan"],
)
def test_linear_logprob_by_other_plans(plan: str, options: str, device: str) -> None:
    function = functools.partial(card.PUBLIC["linear_logprob"], backend="triton")
    number = examples(device, 30)
    check_backend(function, dtypes=HALF, device=device, examples=number, **OPTIONS[options])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", ["roma_loss", "roma_loss_from_logp"])
def test_the_loss(op: Any, backend: str, device: str) -> None:
    function = functools.partial(card.PUBLIC[op], backend=backend)
    number = examples(device, 30 if backend == "torch" else 16)
    check_backend(function, op=op, device=device, examples=number)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_back_end_torch(options: str, device: str) -> None:
    function = functools.partial(card.PUBLIC["linear_logprob"], backend="torch")
    check_backend(function, device=device, examples=examples(device, 60), **OPTIONS[options])


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        *((plan, torch.bfloat16) for plan in PLANS),
        ("triton", torch.float16),
        ("gluon", torch.float16),
    ],
    indirect=["plan"],
)
def test_described_rows(dtype: torch.dtype, plan: str, device: str) -> None:
    """Rows of 16 bytes, ragged in every axis, with few and many of them, options off and on."""
    for rows, (name, options) in itertools.product((1, 40, 300), (OPTIONS | ENTROPY).items()):
        if device == "cpu" and rows != 40:
            continue
        spec = HeadSpec(shape=(rows,), d=200, v=1544, dtype=dtype, **options)
        inputs = spec.make()
        states, weight = (inputs[name].to(device) for name in ("hidden", "weight"))
        assert copyable(states, weight)
        tile = tile_for("forward", states, weight, rows, options=name != "bare")
        newer = device == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10)
        assert tile.descriptors or not newer
        there = card.there("linear_logprob", device)
        compare_head.check_against_oracle(spec, there, unit=matrix_unit(device))


def test_a_loss_of_many_tiles(plan: str, device: str) -> None:
    """K = 4, rows and columns of several tiles, a ragged tail, sequences of differing lengths."""
    size = (
        {"b": 8, "t": 40, "v": 4003, "d": 256} if device == "cuda" else {"b": 3, "t": 9, "v": 643}
    )
    # Seed 3: no log-ratio lies as near to a kink as any matrix unit's rounding.
    spec = LossSpec(k=4, dtype=torch.bfloat16, bias=True, seed=3, **size)
    there: Any = card.there("roma_loss", device)
    compare_whole.check_against_oracle(spec, there, unit=matrix_unit(device))
