"""Correct first: a provider's log-probs and gradients are compared with float64 before it is timed.

Compared are the first `ROWS` tokens of a case, on every view. A provider is refused if a log-prob
is off by more than bf16 logits cost: half a unit in the last place of the largest logit for the
target and for lse, times two. It is refused too if a gradient is off by 5 % of its norm; of the
peers that round their logits the worst was off by 1.3 % (bench/results/cpu-full.csv). A provider
that passes has its errors in the table.

Every timed call is held to the same limits afterwards, at the size that is timed: its log-probs of
those tokens, and its gradients by their states. A row's gradient is its upstream gradient times the
gradient of its own log-prob, so float64 is needed once.
"""

import math
from collections.abc import Callable
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
    dlogp: Tensor
    """[(K+1)·n, D], each row's log-prob differentiated by its own states."""
    dweight: Tensor
    """In fp32, which rounds by 1e-7 and takes half of the memory."""
    limit: float

    @property
    def dstates(self) -> Tensor:
        """[(K+1)·n, D]."""
        return self.dlogp * self.upstream.double()[:, None]


def truth(case: Case) -> Truth:
    """What every provider is compared with; in blocks of rows, so that large heads fit."""
    part = Case(case.shape, case.states[:, :ROWS], case.weight, case.tokens[:ROWS])
    weight = part.weight.double()
    generator = torch.Generator(weight.device).manual_seed(1)
    upstream = torch.randn(len(part.labels), generator=generator, device=weight.device)
    logp, dlogp, dweight = [], [], torch.zeros_like(weight)
    largest = 0.0
    for rows, labels, g in zip(
        part.rows.split(64), part.labels.split(64), upstream.double().split(64), strict=True
    ):
        logits = rows.double() @ weight.T
        largest = max(largest, float(logits.abs().max()))
        lse = logits.logsumexp(1)
        logp.append(logits.gather(1, labels[:, None])[:, 0] - lse)
        dz = -(logits - lse[:, None]).exp()
        dz.scatter_add_(1, labels[:, None], torch.ones_like(g)[:, None])
        dlogp.append(dz @ weight)
        dweight.addmm_(dz.mul_(g[:, None]).T, rows.double())
    views = part.shape.views + 1
    half_a_place = 2.0 ** (math.floor(math.log2(largest)) - 8)
    return Truth(
        part, upstream, torch.cat(logp).view(views, -1), torch.cat(dlogp), dweight.float(),
        2 * 2 * half_a_place,
    )  # fmt: skip


def hold(score: Score, want: Truth, tell: Callable[[str], None] = lambda what: None) -> Errors:
    """The errors of a provider; raises Wrong if one is out of bounds.

    Args:
        score: the provider.
        want: the truth.
        tell: hears which half begins, "forward" or "backward".
    """
    case = want.case
    rows = case.rows.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    tell("forward")
    got = score(rows, weight, case.labels)
    tell("backward")
    got.backward(want.upstream.to(got.dtype))
    if rows.grad is None or weight.grad is None:
        raise Wrong("a gradient is missing")
    off = (got.detach().double().view_as(want.logp) - want.logp).abs()
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
        if limit is not None:
            bound(field.name, value, limit)
    return errors


def hold_call(
    want: Truth, logp: Tensor, dstates: Tensor | None = None, upstream: Tensor | None = None
) -> None:
    """Holds what a timed call made; raises Wrong.

    Args:
        want: the truth.
        logp: [K+1, N].
        dstates: [K+1, N, D], or None after a forward alone.
        upstream: [K+1, N], the gradients by the log-probs that led to `dstates`.
    """
    count = want.logp.shape[1]
    off = (logp.detach()[:, :count].double() - want.logp).abs()
    bound("logp_max", float(off.max()), want.limit)
    if upstream is None or (dstates is None and not upstream.any()):
        return
    if dstates is None:
        raise Wrong("a gradient is missing")
    expected = want.dlogp * upstream[:, :count].double().reshape(-1, 1)
    bound("dhidden", relative(dstates[:, :count].flatten(0, 1), expected), GRADIENT)


def bound(what: str, value: float, limit: float) -> None:
    """Raises Wrong if a value exceeds its limit, or is NaN."""
    if not value <= limit:
        raise Wrong(f"{what} {value:.2e} exceeds {limit:.2e}")


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
    """‖got − want‖ / ‖want‖ in float64, in blocks; 0 if both are zero."""
    off, whole = 0.0, 0.0
    for a, b in zip(got.split(4096), want.split(4096), strict=True):
        b = b.double()
        off += float((a.double() - b).square().sum())
        whole += float(b.square().sum())
    if off == 0:
        return 0.0
    return math.sqrt(off / whole) if whole else math.inf
