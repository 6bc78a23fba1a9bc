"""One call of roma_loss_from_logp held to the oracle: what the tests of the loss share."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, currently_in_test_context
from torch import Tensor

from roma.testing import oracle, tensors, tolerance
from roma.testing.candidate import Backend, on
from roma.testing.strategies import LossSpec
from roma_kernels.roma_loss import batch
from roma_kernels.roma_loss.api import roma_loss_from_logp
from roma_kernels.roma_loss.config import RomaConfig

TERMS = {
    "pg_loss": "main",
    "ref_kl": "ref",
    "roma_aux_loss": "aux",
    "roma_penalty_worst": "inv",
    "roma_penalty_mean": "mean",
    "ppo_kl": "moved",
    "entropy": "entropy",
}
"""Metric → the oracle's token terms that it sums; the loss sums several, the others are shares."""

METRICS = set(batch.METRICS)

LOGPS = ("logp", "view_logp")


def require(condition: bool, otherwise: str) -> None:
    """Discard a drawn case that cannot be compared; one chosen by hand must be comparable."""
    if currently_in_test_context():
        assume(condition)
    assert condition, otherwise


def require_clear_of_kinks(want: oracle.Expected, noise: float) -> None:
    """Leave out a case in which rounding decides between two branches."""
    clear = want.kink > tolerance.KINK_SIGMAS * noise
    require(clear, f"a log-ratio lies {want.kink:.1e} nats from a kink")


def leaves_of(case: dict[str, Any]) -> list[str]:
    """What is differentiable: both kinds of log-probs, and entropies where there is a bonus."""
    return [*LOGPS, *(["entropy"] if case.get("entropy") is not None else [])]


def on_leaves(case: dict[str, Any]) -> dict[str, Any]:
    """The same case with fresh differentiable log-probs and entropies."""
    return case | {n: case[n].detach().clone().requires_grad_() for n in leaves_of(case)}


def call(case: dict[str, Any], backend: Backend) -> Any:
    """The public function on a case of the strategies."""
    case = dict(case)
    run = on(roma_loss_from_logp, backend)
    return run(case.pop("logp"), case.pop("view_logp"), **case)


def expect(case: dict[str, Any], **how: Any) -> oracle.Expected:
    """The oracle on the same case."""
    case = dict(case)
    return oracle.view_loss(case.pop("logp"), case.pop("view_logp"), **case, **how)


def slopes(value: Tensor, leaves: list[Tensor], **how: Any) -> list[Tensor]:
    """Gradients by each leaf, zeros where value does not depend on it."""
    live = [x for x in leaves if x.requires_grad]
    found = iter(
        torch.autograd.grad(value, live, allow_unused=True, **how) if value.requires_grad else []
    )
    grads = [next(found, None) if x.requires_grad else None for x in leaves]
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def check_choice(
    got: Any, want: oracle.Expected, eager: oracle.Expected, noise: float, worst_over: str
) -> None:
    """The chosen view's penalty is the largest, to rounding; masked tokens hold -1.

    Of views with the same log-probs the lowest index must be chosen.
    """
    chosen = got.worst_view
    assert chosen.dtype == torch.int64 and not chosen.requires_grad, "worst_view: expected int64"
    assert chosen.shape == want.worst_view.shape, (
        f"worst_view: expected {list(want.worst_view.shape)}, got {list(chosen.shape)}"
    )
    if want.penalty.shape[1] == 0:
        assert worst_over == "token" or not bool(chosen.any()), "worst_view: expected 0 for K = 0"
        return
    limit = tolerance.bound(want.penalty, eager.penalty, torch.float32, noise).largest
    scored = got.view_logp.detach().reshape(want.penalty.shape[1], -1)
    flat, by_oracle = chosen.reshape(-1), want.worst_view.reshape(-1)
    for row, (mine, theirs) in enumerate(zip(flat.tolist(), by_oracle.tolist(), strict=True)):
        if theirs < 0:
            why = "where masked" if worst_over == "token" else "where the gate leaves no view"
            assert mine == -1, f"worst_view: −1 {why}, got {mine}"
            continue
        values = want.penalty[row]
        assert 0 <= mine < len(values), f"worst_view: expected a view in 0..K-1, got {mine}"
        if worst_over == "sequence":
            out = want.gated[row]
            assert not bool(out[mine]), f"worst_view: chose {mine} in row {row}, which is gated"
            values = values.masked_fill(out, -1.0)
        assert float(values[theirs] - values[mine]) <= 2 * limit, (
            f"worst_view: chose {mine} in row {row}, where the penalties are {values.tolist()}"
        )
        own = scored[:, want.sets[row]]
        for lower in range(mine):
            if worst_over == "sequence" and bool(want.gated[row][lower]):
                continue
            assert not torch.equal(own[lower], own[mine]), (
                f"worst_view: chose {mine} in row {row}, where view {lower} has the same "
                "log-probs; of equal views the lowest index is the worst"
            )


def check_metrics(
    got: Any,
    want: oracle.Expected,
    eager: oracle.Expected,
    leaves: list[Tensor],
    noise: float,
    config: RomaConfig,
    spread: float,
) -> None:
    """Every metric, and the loss itself.

    `leaves` are the oracle's log-probs and entropies; `spread` is the error of a divergence.
    """
    tau = math.inf if config.gate_tau is None else config.gate_tau
    loose = {name: noise * size for name, size in want.loose_terms.items()}
    loose["inv"] = spread / tau * float(want.terms["inv"].detach().abs().sum())
    lambdas = {"main": 1.0, "aux": float(config.lambda_aux), "inv": float(config.lambda_inv)}
    loose["loss"] = sum(weight * loose[name] for name, weight in lambdas.items())
    assert got.metrics.keys() == METRICS, f"metrics: got {list(got.metrics)}"
    for name, result in got.metrics.items():
        bare = result.shape == () and not result.requires_grad
        assert bare, f"{name}: expected a detached 0-dim tensor"
        value, off = want.metrics[name], 0.0  # a share: away from kinks the counts are exact
        if name in TERMS or name == "loss":
            term = TERMS.get(name, name)
            parts = want.terms.values() if name == "loss" else [want.terms[term]]
            by_leaf = slopes(value, leaves, retain_graph=True)
            off = tolerance.scalar_noise(torch.cat(list(parts)), by_leaf, noise)
            off += loose.get(term, 0.0)
        for scalar in (result, got.loss) if name == "loss" else (result,):
            how = {"dtype": scalar.dtype, "noise": off}
            tolerance.check(name, scalar, value, eager.metrics[name], **how)


def gradient_noise(
    want: oracle.Expected,
    name: str,
    own_slope: Tensor,
    gradient: Tensor,
    config: RomaConfig,
    noise: float,
    spread: float,
) -> Tensor:
    """Error of the loss's gradient by the log-probs of that name, if log-ratios are off by noise.

    own_slope is the gradient's own slope: an error of the log-ratio moves the gradient by as much.
    A gate's weight is off by that of its divergence over τ.
    """
    off = 2 * noise * own_slope.abs() + tolerance.eps(torch.float32) * gradient.abs()
    off = off + noise * want.loose.get(name, torch.zeros_like(off))
    if name == "view_logp" and config.gate_tau is not None:
        off = off + spread / config.gate_tau * gradient.abs()
    return off


def penalty_noise(want: oracle.Expected, logp_error: float, slope: float) -> float:
    """Error of one penalty: its slope in δ, at most e^δ + 1, times the error of δ."""
    return (slope + 1) * (2 * logp_error + tolerance.eps(torch.float32))


def own_gradients(spec: LossSpec, case: dict[str, Any], got: Any) -> dict[str, Tensor]:
    """The gradient of another objective by the returned log-probs; zeros where there is none."""
    g = tensors.generator(spec.seed + 2)
    made = {name: torch.randn(getattr(got, name).shape, generator=g) for name in LOGPS}
    weight = case["mask"] * spec.own
    return {name: (x * weight).to(getattr(got, name).dtype) for name, x in made.items()}


def backward(got: Any, upstream: Tensor, own: dict[str, Tensor]) -> None:
    """Backward of upstream·loss + Σ own·log-probs."""
    total = upstream * got.loss
    for name, gradient in own.items():
        if bool(gradient.any()):
            total = total + (gradient * getattr(got, name)).sum()
    if total.requires_grad:
        total.backward()


def check_against_oracle(spec: LossSpec, backend: Backend) -> None:
    """One call: loss, metrics, worst view, both gradients under random upstream gradients."""
    case = spec.make_logp()
    mine = on_leaves(case)
    got = call(mine, backend)
    upstream = torch.randn((), generator=tensors.generator(spec.seed + 1))
    own = own_gradients(spec, case, got)
    backward(got, upstream, own)

    chosen = got.worst_view if spec.k else None
    theirs, plain = on_leaves(case), on_leaves(case)
    want, eager = (
        expect(theirs, worst_view=chosen),
        expect(plain, worst_view=chosen, dtype=torch.float32),
    )
    # Rounding of a log-ratio of this size, once in the difference and once in its exponential.
    noise = tolerance.eps(torch.float32) * max(want.reach, 1.0)
    require_clear_of_kinks(want, noise)

    spread = penalty_noise(want, noise, math.exp(want.reach))
    check_choice(got, want, eager, spread, spec.config.worst_over)
    names = leaves_of(case)
    leaves, plain_leaves = [theirs[n] for n in names], [plain[n] for n in names]
    check_metrics(got, want, eager, leaves, noise, spec.config, spread)

    rate = slopes(want.loss, leaves, create_graph=True, retain_graph=True)
    curve = slopes(torch.stack([g.sum() for g in rate]).sum(), leaves)
    plain_rate = slopes(eager.loss, plain_leaves)
    masked = ~case["mask"]
    for name, g, h, e in zip(names, rate, curve, plain_rate, strict=True):
        grad, others = mine[name].grad, own.get(name, torch.zeros(()))
        if grad is None:  # nothing depends on it
            assert not bool(g.any()) and not bool(others.any()), f"{name} got no gradient"
            continue
        assert bool((grad[..., masked] == 0).all()), f"d{name} on masked positions"
        wobble = gradient_noise(want, name, h, g, spec.config, noise, spread)
        by_entry = wobble * float(upstream.abs()) + tolerance.eps(torch.float32) * others.abs()
        value, rough = upstream * g + others, upstream * e + others
        tolerance.check(f"d{name}", grad, value, rough, dtype=torch.float32, noise=by_entry)

    for name in LOGPS:
        result, given_ = getattr(got, name).detach(), case[name]
        assert result.dtype == torch.float32 and result.shape == given_.shape, name
        assert torch.equal(result, given_.masked_fill(masked, 0.0)), (
            f"{name} is handed back, 0 where masked"
        )


def take(case: dict[str, Any], order: Tensor) -> dict[str, Any]:
    """A padded case with its sequences in another order, or only some of them."""
    rows = (
        "logp",
        "mask",
        "old_logp",
        "ref_logp",
        "view_old_logp",
        "advantages",
        "correct",
        "aux_view",
        "rollout_weight",
        "entropy",
    )
    out = dict(case)
    for name in rows:
        if case[name] is not None:
            out[name] = case[name][order]
    out["view_logp"] = case["view_logp"][:, order]
    return out
