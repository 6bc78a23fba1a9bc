"""Calls that a stranger made and that passed in silence, or failed without a word of use."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.refusals import SPEC, B, D, K, T, V, logp_call, refuse, whole_call
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import compare_whole, tolerance
from roma.testing.strategies import LossSpec

BOTH = pytest.mark.parametrize("call", [whole_call, logp_call])


@BOTH
def test_counts_all_or_none(call: Any, backend: str) -> None:
    """total_tokens alone over three micro-batches gave 1.392 for 0.855."""
    with refuse("total_sequences", "because total_tokens is given"):
        call(backend, total_tokens=100)
    with refuse("total_tokens", "because total_sequences is given"):
        call(backend, total_sequences=100)
    call(backend, total_sequences=100, total_tokens=200)
    config = RomaConfig(penalty_over="correct")
    with refuse("total_correct", "because total_sequences, total_tokens is given"):
        call(backend, total_sequences=100, total_tokens=200, config=config)
    call(backend, total_sequences=100, total_tokens=200, total_correct=9, config=config)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", ["total_sequences", "total_tokens", "total_correct"])
def test_no_count_below_its_own(name: str, kind: Any, backend: str) -> None:
    counts = {"total_sequences": B, "total_tokens": B * T, "total_correct": B}
    whole_call(backend, **counts)
    good = torch.ones(B, T, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    same = {"mask": good[0], "correct": good[1]}
    with refuse(name, f"({counts[name]})", str(counts[name] - 1)):
        whole_call(backend, **same, **(counts | {name: kind(float(counts[name] - 1))}))


@BOTH
@pytest.mark.parametrize("name", ["old_logp", "ref_logp", "view_old_logp"])
def test_nan_on_a_counted_token_is_refused(name: str, call: Any, backend: str) -> None:
    """Where it is masked it may stand."""
    case = SPEC.make() if call is whole_call else SPEC.make_logp()
    assert bool((~case["mask"]).any())
    call(backend, **{name: case[name].masked_fill(~case["mask"], float("nan"))})
    with refuse(name, "NaN", "in sequence 0"):
        call(backend, **{name: torch.full((B, T), float("nan"))})


def test_no_views_no_sampled_view(backend: str) -> None:
    spec = LossSpec(b=B, t=T, k=0, config=RomaConfig(lambda_inv=0), aux=False)
    for call in (whole_call, logp_call):
        with refuse("aux_view", "K = 0"):
            call(backend, spec=spec, aux_view=torch.zeros(B, dtype=torch.int64))


@pytest.mark.parametrize("function", ["linear_logprob", "roma_loss", "roma_loss_from_logp"])
def test_derivatives_that_an_operator_would_lose(function: str, kernel: str) -> None:
    """Forward mode gave a tangent of 0; torch.func.grad an error about setup_context."""

    def value(x: Tensor) -> Tensor:
        if function == "linear_logprob":
            tokens = torch.arange(B * T).view(B, T)
            return roma.linear_logprob(x, weight, tokens, backend=backend).logp.sum()
        call, name = (whole_call, "hidden") if function == "roma_loss" else (logp_call, "logp")
        return call(backend, **{name: x}).loss

    weight, backend = torch.randn(V, D), kernel
    x = SPEC.make_logp()["logp"] if function == "roma_loss_from_logp" else torch.randn(B, T, D)
    for transform in (lambda: torch.func.jvp(value, (x,), (x,)), lambda: torch.func.grad(value)(x)):
        with pytest.raises(RuntimeError, match=r"expected a tensor of reverse-mode.*reference"):
            transform()
    backend = "reference"
    _, tangent = torch.func.jvp(value, (x,), (x,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    terms = gradient * x
    assert abs(float(tangent - terms.sum())) <= tolerance.many(float(terms.abs().sum()))


def test_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"^config: expected a RomaConfig, got dict; .*\*\*options"):
        whole_call("torch", config={"lambda_inv": 1.0})
    with pytest.raises(
        TypeError, match=r"^weight: expected a tensor, got Linear; pass its \.weight"
    ):
        whole_call("torch", weight=torch.nn.Linear(D, V))
    sharded = SPEC.make()["weight"]
    sharded.full_tensor = SimpleNamespace  # what a DTensor has and a tensor has not
    with pytest.raises(TypeError, match=r"^weight: expected a plain tensor.*full_tensor"):
        whole_call("torch", weight=sharded)
    with refuse("weight", f"hidden is [..., {D + 1}]"):
        whole_call("torch", hidden=torch.zeros(B, T, D + 1))


def test_numbers_of_other_kinds() -> None:
    """numpy's numbers are numbers; tensors serve for the two lambdas alone."""
    config = RomaConfig(lambda_inv=np.float32(0.5), max_length=np.int64(7))  # type: ignore[arg-type]
    assert (config.lambda_inv, config.max_length) == (0.5, 7)
    for name, wrong in [
        ("lambda_inv", torch.ones(2)),
        ("lambda_aux", torch.tensor(1)),
        ("clip_low", torch.tensor(0.1)),
        ("lambda_inv", True),
        ("max_length", 7.5),
    ]:
        with refuse(f"RomaConfig.{name}"):
            RomaConfig(**{name: wrong})
    for wrong in (-1.0, float("nan"), float("inf")):
        with refuse("RomaConfig.lambda_inv", "got"):
            logp_call("torch", config=RomaConfig(lambda_inv=torch.tensor(wrong)))


def test_options_of_other_kinds_reach_the_operators(kernel: str) -> None:
    """They travel as text, in which np.float64(0.2) is no number."""

    class Choice(str, enum.Enum):
        TOKEN = "token"

    config = RomaConfig(
        clip_low=np.float64(0.1),  # type: ignore[arg-type]
        aggregation=np.str_("dr_grpo"),  # type: ignore[arg-type]
        worst_over=Choice.TOKEN,  # type: ignore[arg-type]
        max_length=np.int64(9),  # type: ignore[arg-type]
    )
    plain = RomaConfig(clip_low=0.1, aggregation="dr_grpo", worst_over="token", max_length=9)
    assert config == plain and type(config.worst_over) is str
    losses = [logp_call(kernel, config=options).loss for options in (config, plain)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan"), -1.0, "a", True])
def test_softcap_and_temperature_are_finite(wrong: Any) -> None:
    hidden, weight, tokens = torch.randn(2, D), torch.randn(V, D), torch.arange(2)
    for name in ("softcap", "temperature"):
        with refuse(name, repr(wrong)):
            roma.linear_logprob(hidden, weight, tokens, **{name: wrong})
    with refuse("total_tokens", "'3'"):
        logp_call("torch", total_sequences=9, total_tokens="3")


def test_view_divergence_checks_its_arguments() -> None:
    case = SPEC.make_logp()
    roma.view_divergence(case["logp"], case["view_logp"], case["mask"])
    with refuse("view_logp", f"[{K}, {B}, {T}]"):
        roma.view_divergence(case["logp"], case["view_logp"][:, :, :-1], case["mask"])
    with refuse("mask", "int64", kind=ValueError):
        roma.view_divergence(case["logp"], case["view_logp"], case["mask"].long())
    packed = LossSpec(b=B, t=T, k=K, packed=True).make_logp()
    arguments = packed["logp"], packed["view_logp"], packed["mask"]
    with refuse("logp", "[B, T]", "not given"):
        roma.view_divergence(*arguments)
    with refuse("view_logp", f"[K, N] = [{K}, {len(packed['mask'])}]"):
        views = packed["view_logp"][:, 1:]
        roma.view_divergence(packed["logp"], views, packed["mask"], cu_seqlens=packed["cu_seqlens"])
    with refuse("cu_seqlens", "never decrease"):
        roma.view_divergence(*arguments, cu_seqlens=packed["cu_seqlens"].flip(0))


def test_a_masked_vocabulary_leaves_the_loss_finite(backend: str) -> None:
    """A counted token with log-prob −∞ is clamped like any other log-ratio."""
    case = SPEC.make_logp()
    logp = case["logp"].masked_fill(case["mask"], -float("inf"))
    assert torch.isfinite(logp_call(backend, logp=logp, config=RomaConfig()).loss)


def test_help_shows_every_field() -> None:
    for shown in (RomaConfig, roma.RomaLoss, roma.TokenLogprobs):
        names = getattr(shown, "_fields", None) or shown.__dataclass_fields__
        assert shown.__doc__ is not None
        for name in names:
            assert f"\n        {name}: " in shown.__doc__, name


def own_objective(out: Any, case: dict[str, Any]) -> Tensor:
    """A trainer's REINFORCE on the clean log-probs, and something on the views."""
    gain = case["advantages"].view(-1, *[1] * (out.logp.ndim - 1))
    return -(gain * out.logp).sum() + out.view_logp.square().sum()


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
@pytest.mark.parametrize("packed", [False, True])
def test_log_probs_carry_gradients(worst_over: str, packed: bool, backend: str) -> None:
    """With main=None a trainer's own objective on out.logp used to train nothing, silently."""
    config = RomaConfig(main=None, worst_over=worst_over)
    spec = LossSpec(b=B, t=T, k=K, packed=packed, config=config, bias=True)
    gradients = []
    for one_sweep in (True, False):
        case = compare_whole.on_leaves(spec.make())
        if packed:
            case["advantages"] = case["advantages"].mean()[None]
        call = compare_whole.call(case | {"advantages": torch.zeros(B)}, backend)
        out = call
        if not one_sweep:  # the same from linear_logprob, a sweep for each image
            states = [case["hidden"], *case["view_hidden"]]
            masked = case["tokens"].masked_fill(~case["mask"], 0)
            scored = [
                roma.linear_logprob(
                    h, case["weight"], masked, bias=case["bias"], backend=backend
                ).logp.masked_fill(~case["mask"], 0)
                for h in states
            ]
            out = SimpleNamespace(logp=scored[0], view_logp=torch.stack(scored[1:]))
        total = call.loss + own_objective(out, case)
        leaves = [case[name] for name in compare_whole.LEAVES]
        gradients.append(torch.autograd.grad(total, leaves))
    for mine, theirs in zip(*gradients, strict=True):
        assert bool(theirs.any())
        assert float((mine - theirs).abs().max()) <= tolerance.many(float(theirs.abs().max()))


def test_old_logp_left_out_is_the_policys_own(backend: str) -> None:
    """The first update after sampling: ratio 1 everywhere, and no second sweep of the head."""
    spec = LossSpec(b=B, t=T, k=K, bias=True)
    case = compare_whole.on_leaves(spec.make())
    found = compare_whole.call(case | {"old_logp": None}, backend)
    given = compare_whole.call(case | {"old_logp": found.logp.detach()}, backend)
    assert float(found.metrics["ppo_kl"]) == float(found.metrics["pg_clipfrac_higher"]) == 0
    assert torch.equal(found.loss, given.loss)
    leaves = [case[name] for name in compare_whole.LEAVES]
    pairs = zip(*(torch.autograd.grad(x.loss, leaves) for x in (found, given)), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    by_logp = roma.roma_loss_from_logp(
        found.logp.detach(),
        found.view_logp.detach(),
        **{n: case[n] for n in ("mask", "advantages", "correct", "aux_view", "config")},
        backend=backend,
    )
    assert torch.equal(by_logp.loss, found.loss)
