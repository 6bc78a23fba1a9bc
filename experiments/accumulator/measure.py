"""Log-probs of simulated products, their differences between views, and the choice of a view."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data import Case
from bench.gate import agreement
from experiments.accumulator.simulate import multiply
from roma.testing.matrix_unit import AMPERE, HOPPER, MatrixUnit

Product = Callable[[Tensor, Tensor], Tensor]
"""Logits [..., R, V] of states [..., R, D] and rows of the head [..., V, D]."""

GROUP = 64  # tokens whose exact logits are in memory at a time
BLOCK = 16  # tokens at a time, so that a step of a simulation stays in a core's cache
TOP, TAIL = 128, 128  # entries of the vocabulary whose logits are simulated, of each token


def fp32(states: Tensor, weight: Tensor) -> Tensor:
    """A chain of fp32 multiply-adds, each rounded to nearest."""
    # In float64 a sum of such a product and an fp32 number is exact.
    rows, columns = states.double().movedim(-1, 0), weight.double().movedim(-1, 0)
    total = torch.zeros(*states.shape[:-1], weight.shape[-2], device=states.device)
    for h, w in zip(rows.contiguous(), columns.contiguous(), strict=True):
        total = (total + h[..., None] * w[..., None, :]).float()
    return total


def of(unit: MatrixUnit, *, promote: int | None = None) -> Product:
    """The product of a matrix unit."""
    return lambda states, weight: multiply(states, weight, unit, promote=promote)


PRODUCTS = {
    "fp32, each term rounded to nearest": fp32,
    "Ampere, Ada": of(AMPERE),
    "Hopper, Blackwell": of(HOPPER),
    "Hopper, every 128 terms to an fp32 sum": of(HOPPER, promote=128),
}
"""Every way of adding that the table compares."""


@dataclass(frozen=True)
class Row:
    """Errors of log-probs, of δ = view − clean, in nats; how often the worst view is float64's."""

    logp_rms: float
    logp_max: float
    delta_rms: float
    delta_max: float
    worst_view: float


def errors(got: Tensor, want: Tensor) -> Row:
    """From log-probs [K+1, n], clean ones first."""
    off = got - want
    delta = off[1:] - off[0]
    return Row(_rms(off), float(off.abs().max()), _rms(delta), float(delta.abs().max()),
               agreement(got, want))  # fmt: skip


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@torch.no_grad()
def measure(
    case: Case, products: dict[str, Product], *, whole: tuple[str, ...] = ()
) -> dict[str, Row]:
    """A row for each product; those in `whole` compute all logits and are not sampled.

    The log-sum-exp is off by the mean of its logits' errors, weighed by their probabilities. The
    mean is taken over the `TOP` most probable entries of each token, and over `TAIL` drawn from the
    others by their probability.
    """
    got: dict[str, list[Tensor]] = {name: [] for name in products}
    want = []
    draw = torch.Generator(case.weight.device).manual_seed(0)
    for first in range(0, case.shape.tokens, GROUP):
        states = case.states[:, first : first + GROUP]
        tokens = case.tokens[first : first + GROUP]
        logits = torch.cat([states.double() @ w.double().T for w in case.weight.split(8192)], -1)
        exact = _logp(logits, tokens)
        want.append(exact)
        entries, share = _sample(logits, draw)
        entries = torch.cat([tokens[:, None], entries], 1)
        some = logits.gather(-1, entries.expand(len(logits), -1, -1))
        rows = case.weight[entries]
        blocks = list(zip(states.transpose(0, 1).split(BLOCK), rows.split(BLOCK), strict=True))
        for name, product in products.items():
            if name in whole:
                got[name].append(_logp(product(states, case.weight).double(), tokens))
                continue
            off = torch.cat([product(*block) for block in blocks]).double().transpose(0, 1) - some
            lse = torch.log1p((share * torch.expm1(off[..., 1:])).sum(-1))
            got[name].append(exact + off[..., 0] - lse)
    return {name: errors(torch.cat(parts, 1), torch.cat(want, 1)) for name, parts in got.items()}


def _logp(logits: Tensor, tokens: Tensor) -> Tensor:
    target = logits.gather(-1, tokens.expand(len(logits), -1)[..., None])[..., 0]
    return target - logits.logsumexp(-1)


def _sample(logits: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Entries [n, TOP + TAIL], chosen by the clean logits, and each row's share [K+1, n, …]."""
    p = logits.softmax(-1)
    top = p[0].topk(min(TOP, p.shape[-1])).indices
    rest = p[0].scatter(-1, top, 0.0)
    if not bool((rest.sum(-1) > 0).all()):
        return top, p.gather(-1, top.expand(len(p), -1, -1))
    tail = torch.multinomial(rest, TAIL, replacement=True, generator=draw)
    entries = torch.cat([top, tail], 1)
    share = p.gather(-1, entries.expand(len(p), -1, -1))
    # An entry of the tail stands for 1/TAIL of the clean tail; for a view's by its own probability.
    share[..., len(top[0]) :] *= (rest.sum(-1, keepdim=True) / TAIL) / p[0].gather(-1, tail)
    return entries, share
