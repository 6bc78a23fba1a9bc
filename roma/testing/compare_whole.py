"""One call of roma_loss held to the oracle: what the tests of the whole loss share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from roma.testing import compare_logp, oracle, tensors, tolerance
from roma.testing.candidate import Backend, on
from roma.testing.matrix_unit import MatrixUnit
from roma.testing.strategies import LossSpec
from roma_kernels.linear_logprob.reference import HeadReference
from roma_kernels.roma_loss.api import roma_loss

LEAVES = ("hidden", "view_hidden", "weight", "bias")


def on_leaves(
    case: dict[str, Any], dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The same case with fresh leaves, differentiable unless frozen."""
    fresh = {
        name: case[name]
        .detach()
        .clone()
        .to(dtype or case[name].dtype)
        .requires_grad_(name not in frozen)
        for name in LEAVES
        if case[name] is not None
    }
    return case | fresh


def split(case: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The positional and the keyword arguments of roma_loss."""
    positional = ("hidden", "view_hidden", "weight", "tokens")
    return tuple(case[n] for n in positional), {
        n: x for n, x in case.items() if n not in positional
    }


def call(case: dict[str, Any], backend: Backend) -> Any:
    """The public function on a case of the strategies."""
    positional, named = split(case)
    return on(roma_loss, backend)(*positional, **named)


def expect(case: dict[str, Any], **how: Any) -> oracle.Expected:
    """The oracle on the same case."""
    return oracle.roma_loss(**case, **how)


def stack_rows(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [(K+1)·n, D] and tokens of all counted rows, clean ones first.

    And the counted places.
    """
    counted = case["mask"].reshape(-1).nonzero()[:, 0]
    d = case["hidden"].shape[-1]
    states = [case["hidden"], *case["view_hidden"]]
    flat = torch.cat([x.detach().reshape(-1, d)[counted] for x in states])
    return flat, case["tokens"].reshape(-1)[counted].repeat(len(states)), counted


def check_against_oracle(
    spec: LossSpec,
    backend: Backend,
    frozen: tuple[str, ...] = (),
    unit: MatrixUnit | None = None,
) -> None:
    """One call.

    Log-probs, loss, metrics, worst view, and dh, d(view)h, dW, db under a random upstream gradient.
    `unit` is what multiplies bf16 and fp16 numbers, if their sums are not rounded to nearest.
    """
    case = spec.make()
    accumulate = tolerance.accumulator(spec.dtype)
    mine = on_leaves(case, frozen=frozen)
    got = call(mine, backend)
    upstream = torch.randn((), generator=tensors.generator(spec.seed + 1)).to(accumulate)
    own = compare_logp.own_gradients(spec, case, got)
    compare_logp.backward(got, upstream, own)

    theirs, plain = on_leaves(case, torch.float64), on_leaves(case, accumulate)
    chosen = got.worst_view if spec.k else None
    want = expect(theirs, worst_view=chosen)
    eager = expect(plain, worst_view=chosen, dtype=accumulate)
    heads = [vars(head) for head in want.heads.values()]
    rows, targets, counted = stack_rows(case)
    stacked = HeadReference(**{n: torch.cat([head[n] for head in heads]) for n in heads[0]})
    scale = 1 / spec.config.temperature
    row_noise = tolerance.logp_noise(stacked, rows, case["weight"], scale, spec.dtype, unit)
    worst = float(row_noise.max()) if len(row_noise) else 0.0
    # A log-ratio is a difference of two log-probs, one of them given.
    noise = 2 * worst + tolerance.eps(accumulate) * max(want.reach, 1.0)
    compare_logp.require_clear_of_kinks(want, noise)

    masked = ~case["mask"]
    for name in ("logp", "view_logp"):
        result, value, rough = getattr(got, name), getattr(want, name), getattr(eager, name)
        assert bool((result[..., masked] == 0).all()), f"{name}: expected 0 where masked"
        tolerance.check(name, result, value, rough, dtype=accumulate, noise=worst)
    spread = compare_logp.penalty_noise(want, noise, math.exp(want.reach))
    compare_logp.check_choice(got, want, eager, spread, spec.config.worst_over)
    assert want.logp is not None and want.view_logp is not None
    logps = [want.logp, want.view_logp]
    leaves = [*logps, *([] if want.entropy is None else [want.entropy])]
    compare_logp.check_metrics(got, want, eager, leaves, noise, spec.config, spread)

    rate = compare_logp.slopes(want.loss, logps, create_graph=True, retain_graph=True)
    bend = torch.stack([g.sum() for g in rate]).sum()
    curve = compare_logp.slopes(bend, logps, retain_graph=True)

    def by_row(logp: Tensor, view_logp: Tensor) -> Tensor:
        whole = torch.cat([logp[None], view_logp]).detach().reshape(spec.k + 1, -1)
        return whole[:, counted].reshape(-1)

    offs = [
        compare_logp.gradient_noise(want, name, h, g, spec.config, noise, spread)
        for name, h, g in zip(compare_logp.LOGPS, curve, rate, strict=True)
    ]
    size = float(upstream.abs())
    g = by_row(*rate) * float(upstream) + by_row(own["logp"], own["view_logp"])
    of_entropy = torch.zeros_like(g)
    if want.entropy is not None:  # of the clean image alone
        (by_entropy,) = compare_logp.slopes(want.loss, [want.entropy], retain_graph=True)
        of_entropy[: len(counted)] = by_entropy.reshape(-1)[counted] * float(upstream)
    dz = tolerance.dlogits(
        stacked,
        targets,
        g,
        of_entropy,
        by_row(*offs) * size + tolerance.eps(accumulate) * g.abs(),
        row_noise,
        scale=scale,
        softcap=spec.config.softcap,
        dtype=spec.dtype,
    )
    by_state = tolerance.dhidden_noise(dz, case["weight"], spec.dtype)
    largest = by_state.amax() if by_state.numel() else 0.0
    spreads = {
        "hidden": largest,
        "view_hidden": largest,
        "weight": tolerance.dweight_noise(dz, rows, spec.dtype),
        "bias": tolerance.dweight_noise(dz, torch.ones(len(rows), 1), spec.dtype)[:, 0],
    }
    names = [n for n in LEAVES if case[n] is not None]

    def gradients(found: oracle.Expected, leaves: dict[str, Any]) -> list[Tensor]:
        total = upstream.to(found.loss.dtype) * found.loss
        for which in compare_logp.LOGPS:
            total = total + (own[which].to(total.dtype) * getattr(found, which)).sum()
        return compare_logp.slopes(total, [leaves[n] for n in names], retain_graph=True)

    pairs = zip(names, gradients(want, theirs), gradients(eager, plain), strict=True)
    for name, value, rough in pairs:
        grad = mine[name].grad
        if name in frozen:
            assert grad is None, f"{name} is frozen"
            continue
        if grad is None:  # nothing depends on it
            assert not bool(value.any()), f"{name} got no gradient"
            continue
        room = torch.finfo(grad.dtype).max / 2
        fits = not value.numel() or float(value.abs().max()) < room
        compare_logp.require(fits, f"d{name} is too large for {grad.dtype}")
        if name in ("hidden", "view_hidden"):
            assert bool((grad[..., masked, :] == 0).all()), f"d{name} on masked positions"
        how = {"dtype": mine[name].dtype, "noise": spreads[name]}
        tolerance.check(f"d{name}", grad, value, rough, **how)
