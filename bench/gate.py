"""Correct first: log-probs and gradients of a provider held to float64 before it is timed.

The first `ROWS` tokens of a case, on every view. A provider is refused where it errs by more than
bf16 logits would: twice half a unit of the last place of the largest logit, for the target and for
lse; or where a gradient is off by 5 % of its norm: of the peers that round their logits the worst
was off by 1.3 % (bench/results/cpu-full.csv). What passes has its errors in the table.
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
    """Of the log-probs in nats, of the choice of the worst view, and of the gradients."""

    logp_rms: float
    logp_max: float
    worst_view: float
    """Share of tokens whose worst view (largest k3) is float64's; NaN without views."""
    dhidden: float
    """‖got − want‖ / ‖want‖, as is the next."""
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
    """What every provider is held to; by blocks of rows, so that large heads fit."""
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
    """The errors of a provider; raises Wrong."""
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
    """Share of tokens on which two [K+1, n] of log-probs choose the same worst view."""
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
