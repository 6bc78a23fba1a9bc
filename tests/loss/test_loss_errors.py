"""Wrong shapes, dtypes and devices: DESIGN.md, "What a wrong input gets", held to its messages.

A message reads `name: expected X, got Y; remedy`, and it comes before anything is computed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.refusals import (
    DTYPE_ERRORS,
    SPEC,
    B,
    D,
    K,
    T,
    V,
    head_call,
    logp_call,
    refuse,
    whole_call,
)

from roma.testing.strategies import HeadSpec, LossSpec


def test_good_cases_pass(backend: str) -> None:
    """What the tests below break is whole."""
    head_call(backend)
    whole_call(backend)
    logp_call(backend)


@pytest.mark.parametrize(
    ("name", "wrong", "parts"),
    [
        ("hidden", torch.zeros(()), []),
        ("weight", torch.zeros(V, D + 1), [str(D), str(D + 1)]),
        ("weight", torch.zeros(D, V), [str(D), str(V)]),
        ("weight", torch.zeros(V), [str(V)]),
        ("weight", torch.zeros(0, D), []),
        ("tokens", torch.zeros(4, dtype=torch.int64), ["4", "5"]),
        ("tokens", torch.zeros(5, 1, dtype=torch.int64), ["[5, 1]"]),
        ("bias", torch.zeros(V + 1), [str(V), str(V + 1)]),
        ("bias", torch.zeros(1, V), [f"[1, {V}]"]),
        ("temperature", torch.ones(4), ["4", "5"]),
    ],
)
def test_head_shapes(name: str, wrong: torch.Tensor, parts: list[str], backend: str) -> None:
    """Shapes of linear_logprob: the message shows the expected and the actual one."""
    with refuse(name, *parts):
        head_call(backend, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidden", torch.zeros(B * T, D)),
        ("view_hidden", torch.zeros(B, T, D)),
        ("view_hidden", torch.zeros(K, B, T + 1, D)),
        ("view_hidden", torch.zeros(K, T, B, D)),
        ("weight", torch.zeros(D, V)),
        ("bias", torch.zeros(V + 1)),
        ("tokens", torch.zeros(T, B, dtype=torch.int64)),
    ],
)
def test_whole_shapes(name: str, wrong: torch.Tensor, backend: str) -> None:
    """Shapes that only roma_loss has."""
    with refuse(name, str(wrong.shape[-1])):
        whole_call(backend, **{name: wrong})


def test_hidden_and_weight_disagree(backend: str) -> None:
    """A hidden size that is not the head's: both sizes are shown, whichever of the two is named."""
    with refuse("weight", str(D), str(D + 1)):
        whole_call(
            backend, hidden=torch.zeros(B, T, D + 1), view_hidden=torch.zeros(K, B, T, D + 1)
        )


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mask", torch.ones(T, B, dtype=torch.bool)),
        ("mask", torch.ones(B, dtype=torch.bool)),
        ("advantages", torch.zeros(T, B)),
        ("advantages", torch.zeros(B + 1)),
        ("advantages", torch.zeros(B, 1)),
        ("correct", torch.ones(B + 1, dtype=torch.bool)),
        ("correct", torch.ones(B, T, dtype=torch.bool)),
        ("old_logp", torch.zeros(T, B)),
        ("ref_logp", torch.zeros(B, T + 1)),
        ("view_old_logp", torch.zeros(K, B, T)),
        ("aux_view", torch.zeros(B + 1, dtype=torch.int64)),
        ("aux_view", torch.zeros((), dtype=torch.int64)),
        ("total_sequences", torch.ones(2)),
        ("total_tokens", torch.ones(B, T)),
        ("total_correct", torch.ones(1)),
    ],
)
@pytest.mark.parametrize("call", [whole_call, logp_call])
def test_loss_shapes(name: str, wrong: torch.Tensor, call: Any, backend: str) -> None:
    """Shapes of what both forms of the loss share."""
    with refuse(name):
        call(backend, **{name: wrong})


def test_transposed_advantages_are_explained(backend: str) -> None:
    """STYLE rule 8's own example: both accepted shapes stand in the message."""
    with refuse("advantages", "[B]", f"[{B}]", "[B, T]", f"[{B}, {T}]", f"[{T}, {B}]"):
        logp_call(backend, advantages=torch.zeros(T, B))


def test_view_logp_shape(backend: str) -> None:
    """view_logp without its axis K, or of another length."""
    with refuse("view_logp", f"[{B}, {T}]"):
        logp_call(backend, view_logp=torch.zeros(B, T))
    with refuse("view_logp", str(T + 1)):
        logp_call(backend, view_logp=torch.zeros(K, B, T + 1))


def test_view_of_another_grid(backend: str) -> None:
    """A view with another token count than the clean image's: the message names the cause."""
    with refuse("view_hidden", "grid"):
        whole_call(backend, view_hidden=torch.zeros(K, B, T + 2, D))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidden", torch.zeros(5, D, dtype=torch.int64)),
        ("weight", torch.zeros(V, D, dtype=torch.int32)),
        ("tokens", torch.zeros(5, dtype=torch.int32)),
        ("tokens", torch.zeros(5)),
        ("bias", torch.zeros(V, dtype=torch.int64)),
    ],
)
def test_head_dtypes(name: str, wrong: torch.Tensor, backend: str) -> None:
    """Dtypes of linear_logprob: the message names the one that came."""
    with refuse(name, str(wrong.dtype).removeprefix("torch."), kind=DTYPE_ERRORS):
        head_call(backend, **{name: wrong})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mask", torch.int64),
        ("mask", torch.float32),
        ("correct", torch.int64),
        ("correct", torch.float32),
        ("advantages", torch.int64),
        ("old_logp", torch.int64),
        ("ref_logp", torch.bool),
        ("view_old_logp", torch.int32),
        ("aux_view", torch.int32),
        ("aux_view", torch.float32),
    ],
)
@pytest.mark.parametrize("call", [whole_call, logp_call])
def test_loss_dtypes(name: str, dtype: torch.dtype, call: Any, backend: str) -> None:
    """A 0/1 float for a bool, int32 for int64: refused, never guessed."""
    good = SPEC.make()[name]
    with refuse(name, str(dtype).removeprefix("torch."), kind=DTYPE_ERRORS):
        call(backend, **{name: good.to(dtype)})


@pytest.mark.parametrize("name", ["logp", "view_logp"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_log_probs_keep_float32(name: str, dtype: torch.dtype, backend: str) -> None:
    """Log-probs in half precision are too coarse for k3 (MATH section 7)."""
    with refuse(name, str(dtype).removeprefix("torch."), kind=DTYPE_ERRORS):
        logp_call(backend, **{name: SPEC.make_logp()[name].to(dtype)})


def test_mixed_views(backend: str) -> None:
    """Hidden states of the views have the dtype of the clean ones."""
    with refuse("view_hidden", "bfloat16", kind=DTYPE_ERRORS):
        whole_call(backend, view_hidden=SPEC.make()["view_hidden"].bfloat16())


@pytest.mark.parametrize("name", ["mask", "advantages", "correct", "old_logp", "aux_view"])
def test_not_a_tensor(name: str, backend: str) -> None:
    """A list where a tensor belongs is named too."""
    value = SPEC.make_logp()[name].tolist()
    with refuse(name, "list", kind=DTYPE_ERRORS):
        logp_call(backend, **{name: value})


@pytest.mark.parametrize("name", ["weight", "tokens", "bias", "temperature"])
def test_head_devices(name: str, backend: str) -> None:
    """The meta device stands in for another GPU."""
    inputs = HeadSpec(d=D, v=V, bias=True, temperature="rows").make()
    with refuse(name, "cpu", "meta"):
        head_call(backend, **{name: inputs[name].to("meta")})


@pytest.mark.parametrize(
    "name",
    [
        "view_hidden",
        "weight",
        "tokens",
        "mask",
        "advantages",
        "correct",
        "old_logp",
        "ref_logp",
        "view_old_logp",
        "aux_view",
    ],
)
def test_loss_devices(name: str, backend: str) -> None:
    """Every tensor of roma_loss must lie where hidden lies."""
    with refuse(name, "cpu", "meta"):
        whole_call(backend, **{name: SPEC.make()[name].to("meta")})


def test_cu_seqlens_device(backend: str) -> None:
    """cu_seqlens too."""
    spec = LossSpec(b=B, t=T, packed=True)
    with refuse("cu_seqlens", "cpu", "meta"):
        logp_call(backend, spec=spec, cu_seqlens=spec.make_logp()["cu_seqlens"].to("meta"))
