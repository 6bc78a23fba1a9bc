"""Correct first: a provider's log-probs and gradients are compared with float64 before it is timed.

Compared are the first `ROWS` tokens of a case, on every view. A provider is refused if a log-prob
is off by more than bf16 logits cost: half a unit in the last place of the largest logit for the
target and for lse, times two. It is refused too if a gradient is off by 5 % of its norm; of the
peers that round their logits the worst was off by 1.3 % (bench/results/cpu-full.csv). A provider
that passes has its errors in the table.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.data import Case
from bench.providers import Score

ROWS = 128
GRADIENT = 0.05


class Wrong(Exception):
    """A provider's result is out of bounds."""


@dataclass(frozen=True)
class Errors:
    """Errors of the log-probs (nats), of the choice of the worst view, and of the gradients."""

    logp_rms: float
    logp_max: float
    worst_view: float
    """Share of tokens whose worst view (largest k3) is float64's; NaN without views."""
    dhidden: float
    """‖got − want‖ / ‖want‖; so is dweight."""
    dweight: float


@dataclass(frozen=True)
class Truth:
    """Float64 log-probs [K+1, n] of the first n tokens, and gradients of Σ g·logp."""

    case: Case
    upstream: Tensor
    logp: Tensor
    dstates: Tensor
    dweight: Tensor
    limit: float


def truth(case: Case) -> Truth:
    """What every provider is compared with; in blocks of rows, so that large heads fit."""
    part = Case(case.shape, case.states[:, :ROWS], case.weight, case.tokens[:ROWS])
    weight = part.weight.double()
    generator = torch.Generator(weight.device).manual_seed(1)
    upstream = torch.randn(len(part.labels), generator=generator, device=weight.device)
    logp, dstates, dweight = [], [], torch.zeros_like(weight)
    largest = 0.0
    for rows, labels, g in zip(
        part.rows.split(64), part.labels.split(64), upstream.double().split(64), strict=True
    ):
        logits = rows.double() @ weight.T
        largest = max(largest, float(logits.abs().max()))
        lse = logits.logsumexp(1)
        logp.append(logits.gather(1, labels[:, None])[:, 0] - lse)
        dz = -(logits - lse[:, None]).exp() * g[:, None]
        dz.scatter_add_(1, labels[:, None], g[:, None])
        dstates.append(dz @ weight)
        dweight += dz.T @ rows.double()
    views = part.shape.views + 1
    half_a_place = 2.0 ** (math.floor(math.log2(largest)) - 8)
    return Truth(
        part, upstream, torch.cat(logp).view(views, -1), torch.cat(dstates), dweight,
        2 * 2 * half_a_place,
    )  # fmt: skip


def hold(score: Score, want: Truth) -> Errors:
    """The errors of a provider; raises Wrong if one is out of bounds."""
    case = want.case
    rows = case.rows.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    got = score(rows, weight, case.labels)
    got.backward(want.upstream.to(got.dtype))
    off = (got.detach().double().view_as(want.logp) - want.logp).abs()
    assert rows.grad is not None and weight.grad is not None
    errors = Errors(
        logp_rms=float(off.square().mean().sqrt()),
        logp_max=float(off.max()),
        worst_view=agreement(got.detach().double().view_as(want.logp), want.logp),
        dhidden=relative(rows.grad, want.dstates),
        dweight=relative(weight.grad, want.dweight),
    )
    limits = {"logp_max": want.limit, "dhidden": GRADIENT, "dweight": GRADIENT}
    for field in fields(errors):
        value, limit = getattr(errors, field.name), limits.get(field.name)
        if limit is not None and not value <= limit:
            raise Wrong(f"{field.name} {value:.2e} exceeds {limit:.2e}")
    return errors


def agreement(got: Tensor, want: Tensor) -> float:
    """Share of tokens for which two sets of log-probs [K+1, n] have the same worst view."""
    if len(got) < 2:
        return math.nan
    choices = []
    for logp in (got, want):
        gap = logp[1:] - logp[0]
        choices.append((torch.expm1(gap) - gap).argmax(0))
    return float((choices[0] == choices[1]).double().mean())


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got.double() - want).norm() / want.norm())
