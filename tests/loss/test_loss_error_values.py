"""Wrong values, combinations and options.

DESIGN.md, "What a wrong input gets", held to its messages.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from support.counting import Watch
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

from roma import RomaConfig
from roma.testing import compare_logp, compare_whole
from roma.testing.strategies import LossSpec
from roma_kernels import backends


@pytest.mark.parametrize("token", [-1, -100, V, V + 7])
def test_token_out_of_range(token: int, backend: str) -> None:
    """The first bad id and the range are shown; on masked positions anything goes."""
    tokens = torch.zeros(5, dtype=torch.int64)
    tokens[3] = token
    with refuse("tokens", str(token), f"{V - 1}"):
        head_call(backend, tokens=tokens)
    case = SPEC.make()
    counted, masked = case["mask"].nonzero()[0], (~case["mask"]).nonzero()[0]
    bad = case["tokens"].clone()
    bad[tuple(counted)] = token
    with refuse("tokens", str(token), f"{V - 1}"):
        whole_call(backend, tokens=bad)
    good = case["tokens"].clone()
    good[tuple(masked)] = token
    assert torch.equal(whole_call(backend, tokens=good).loss, whole_call(backend).loss)


@pytest.mark.parametrize("call", [whole_call, logp_call])
def test_nan_advantage(call: Any, backend: str) -> None:
    """NaN on a counted sequence or token is refused.

    On a sequence or token that does not count it is not looked at.
    """
    for token_advantages in (False, True):
        spec = LossSpec(b=B, t=T, difficulty="row_all_masked", token_advantages=token_advantages)
        case = spec.make() if call is whole_call else spec.make_logp()
        bad = case["advantages"].clone()
        bad[1] = float("nan")
        with refuse("advantages", "nan"):
            call(backend, spec=spec, advantages=bad)
        unseen = case["advantages"].clone()
        unseen[0] = float("nan")
        loss = call(backend, spec=spec, advantages=unseen).loss
        assert bool(torch.isfinite(loss)) and torch.equal(loss, call(backend, spec=spec).loss)


@pytest.mark.parametrize("index", [-1, K, 99])
@pytest.mark.parametrize("call", [whole_call, logp_call])
def test_aux_view_out_of_range(index: int, call: Any, backend: str) -> None:
    """The range is that of the views at hand."""
    with refuse("aux_view", str(index), str(K - 1)):
        call(backend, aux_view=torch.tensor([0, index, 0]))


@pytest.mark.parametrize(
    "wrong",
    [[0, 4, 2, 9], [1, 3, 6, 9], [0, 3, 6, 8], [0, 3, 6, 10], [0, -3, 6, 9]],
    ids=["decreasing", "start", "short", "long", "negative"],
)
def test_cu_seqlens_values(wrong: list[int], backend: str) -> None:
    """Never decreasing, from 0 to N."""
    n = 9
    case = {
        "logp": torch.zeros(n),
        "view_logp": torch.zeros(K, n),
        "mask": torch.ones(n, dtype=torch.bool),
        "advantages": torch.zeros(B),
        "correct": torch.ones(B, dtype=torch.bool),
        "old_logp": torch.zeros(n),
        "config": RomaConfig(),
    }
    compare_logp.call(case | {"cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int32)}, backend)
    with refuse("cu_seqlens", str(wrong[1]), "9"):
        compare_logp.call(case | {"cu_seqlens": torch.tensor(wrong, dtype=torch.int32)}, backend)


def test_cu_seqlens_form(backend: str) -> None:
    """int32, one dimension, at least one sequence; and the tensors beside it are packed."""
    spec = LossSpec(b=B, t=T, packed=True)
    good = spec.make_logp()["cu_seqlens"]
    with refuse("cu_seqlens", "int64", kind=DTYPE_ERRORS):
        logp_call(backend, spec=spec, cu_seqlens=good.long())
    with refuse("cu_seqlens"):
        logp_call(backend, spec=spec, cu_seqlens=good[None])
    with refuse("cu_seqlens"):
        logp_call(backend, spec=spec, cu_seqlens=good[:1])
    with refuse("logp", f"[{B}, {T}]"):
        logp_call(backend, cu_seqlens=torch.tensor([0, 5, 10, 15], dtype=torch.int32))
    with refuse("logp", "cu_seqlens"):
        logp_call(backend, spec=spec, cu_seqlens=None)
    # One sequence more than advantages and correct know of: whichever is looked at first is named.
    with refuse("advantages", f"[{B + 1}]", f"[{B}]"):
        logp_call(backend, spec=spec, cu_seqlens=torch.cat([good, good[-1:]]))


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["total_sequences", "total_tokens", "total_correct"])
def test_totals(name: str, wrong: float, backend: str) -> None:
    """A count is a finite number, not negative, given as a number or as a 0-dim tensor."""
    with refuse(name, str(wrong)):
        logp_call(backend, **{name: wrong})
    with refuse(name, str(wrong)):
        logp_call(backend, **{name: torch.tensor(float(wrong))})


def test_total_of_zero_sequences(backend: str) -> None:
    """Zero sequences in all, with sequences at hand, cannot be: refused, never inf or NaN."""
    with refuse("total_sequences", "0"):
        logp_call(backend, total_sequences=0)


def test_no_views_with_a_penalty(backend: str) -> None:
    """K = 0 with λ_inv > 0: the remedy is one of two."""
    for views in (None, torch.zeros(0, B, T, D)):
        with refuse("view_hidden", "K = 0", "lambda_inv"):
            whole_call(backend, view_hidden=views, aux_view=None, view_old_logp=None)
    for views in (None, torch.zeros(0, B, T)):
        with pytest.raises(ValueError, match=r"(?s)view_logp.*expected .*lambda_inv.*got .*; \S"):
            logp_call(backend, view_logp=views, aux_view=None, view_old_logp=None)


def test_aux_view_without_views(backend: str) -> None:
    """A sampled view when there is none."""
    config = RomaConfig(lambda_inv=0.0)
    with refuse("aux_view"):
        logp_call(backend, view_logp=None, config=config)


def test_missing_partners(backend: str) -> None:
    """ref_coef > 0 needs ref_logp; aux_old="view" needs view_old_logp.

    Without their cause neither is needed.
    """
    for call in (whole_call, logp_call):
        with refuse("ref_logp", "None", "ref_coef"):
            call(backend, ref_logp=None)
        with refuse("view_old_logp", "None", "aux_old"):
            call(backend, view_old_logp=None)
        call(backend, view_old_logp=None, aux_view=None)
    with refuse("RomaConfig.ref_coef", "main is None"):  # the KL would be dropped without a word
        RomaConfig(ref_coef=0.1, main=None)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("lambda_inv", -1.0),
        ("lambda_inv", float("nan")),
        ("lambda_inv", float("inf")),
        ("lambda_aux", -0.5),
        ("penalty_ratio", "views/clean"),
        ("worst_over", "tokens"),
        ("penalty_over", "right"),
        ("main", "ppo"),
        ("aggregation", "mean"),
        ("clip_low", -0.1),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("dual_clip", 0.5),
        ("ref_coef", -0.1),
        ("aux_old", "old"),
        ("log_ratio_clamp", 0.0),
        ("log_ratio_clamp", -20.0),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("softcap", 0.0),
        ("softcap", -30.0),
        ("max_length", 0),
    ],
)
def test_config_values(name: str, wrong: Any) -> None:
    """A bad value raises a ValueError that names the field, when the config is made."""
    with refuse(f"RomaConfig.{name}", str(wrong)):
        RomaConfig(**{name: wrong})


def test_config_combinations() -> None:
    """dr_grpo divides by max_length; the dataclass is frozen; a word's alternatives are listed."""
    with refuse("RomaConfig.max_length", "dr_grpo"):
        RomaConfig(aggregation="dr_grpo")
    RomaConfig(aggregation="dr_grpo", max_length=128)
    with refuse("RomaConfig.worst_over", "sequence", "token", "batch", "mean"):
        RomaConfig(worst_over="sentence")
    with pytest.raises(FrozenInstanceError):
        RomaConfig().lambda_inv = 2.0
    with pytest.raises(TypeError):
        RomaConfig(lamda_inv=1.0)


@pytest.mark.parametrize(
    ("name", "wrong"), [("temperature", 0.0), ("temperature", float("nan")), ("softcap", -1.0)]
)
def test_head_scalars(name: str, wrong: float, backend: str) -> None:
    """Temperature and softcap of linear_logprob."""
    with refuse(name, str(wrong)):
        head_call(backend, **{name: wrong})


def test_row_temperature_must_be_positive(backend: str) -> None:
    """One row of temperature 0 among good ones."""
    with refuse("temperature"):
        head_call(backend, temperature=torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))


def test_unknown_back_end() -> None:
    """The alternatives are listed."""
    for call in (head_call, whole_call, logp_call):
        with refuse("backend", "cuda", "torch", "reference", "auto"):
            call("cuda")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="asks for a back end that is not available here"
)
def test_unavailable_back_end_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for Triton on CPU tensors is an error, never another back end in silence."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (head_call, whole_call, logp_call):
        with pytest.raises((ValueError, RuntimeError), match=r"(?s)triton.*; \S"):
            call("triton")


def test_refused_before_anything_is_computed(kernel: str) -> None:
    """The checks come before the products: none has run when the error arrives."""
    bad = SPEC.make()["advantages"].clone()
    bad[:] = float("nan")
    with Watch() as watch, refuse("advantages"):
        whole_call(kernel, advantages=bad)
    # The strategies' own oracle scores the case inside the block: two products per view and one for
    # the clean image.
    with Watch() as making:
        SPEC.make()
    assert watch.products == making.products


def test_inputs_are_not_modified(backend: str) -> None:
    """A call leaves every argument as it was, bit for bit."""
    for spec in (SPEC, LossSpec(packed=True, difficulty="nan_when_masked", token_advantages=True)):
        case, again = spec.make(), spec.make()
        compare_whole.call(case, backend)
        for name, value in case.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value.nan_to_num(7.5), again[name].nan_to_num(7.5)), name


def test_an_old_gpu_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ampere there are no bf16 products: "auto" takes torch, and says why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "T4")
    for capability, expected in (((7, 5), "torch"), ((8, 0), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert backends.choose("cuda")[0] == expected
        if expected == "torch":
            said = next(b.reason for b in backends.backends() if b.name == "triton")
            assert said == "T4 has capability 7.5; the kernels need 8.0 (Ampere) for bf16"
