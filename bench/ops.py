"""The measured ops: from a variant and a provider to a call that can be timed.

`Bench.run` gives the call, or raises `Unavailable` or `Wrong`; a provider's log-probs are held to
float64 first (gate.py), the gradients of a whole loss too.

For the whole loss every provider of log-probs is completed, twice, by the same view loss:

    dense    log-probs of all (K+1)·N rows, roma_loss_from_logp, backward through all of them
    active   log-probs of all rows without a graph, the loss's coefficients, then the provider's
             forward and backward on the rows whose coefficient is not 0: what a careful user of
             that provider would write
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import roma
from bench import gate
from bench.data import Case, make
from bench.measure import Run
from bench.providers import OURS, PROVIDERS, Provider, Score, Unavailable
from bench.variants import Variant
from roma.kernels.products import listen

FEW = (OURS, "naive fp32", "torch fused", "liger", "cce", "trl")
ACTIVE = " active"


@dataclass
class Bench:
    """A variant with its data."""

    variant: Variant
    device: str
    case: Case

    def __post_init__(self) -> None:
        self.want = gate.truth(self.case) if self.variant.op != "view_loss" else None
        self.errors: dict[str, gate.Errors] = {}
        self.loss = (
            _loss_case(self.variant, self.case) if self.variant.op != "linear_logprob" else {}
        )

    @property
    def names(self) -> list[str]:
        """All candidates, ours first."""
        if self.variant.op == "view_loss":
            return [OURS, "eager", "compile"]
        found = [p.name for p in PROVIDERS if self.variant.everyone or p.name in FEW]
        if self.variant.op == "roma_loss":
            found += [name + ACTIVE for name in found if name != OURS]
        return found

    def run(self, name: str) -> Run:
        """One call of a candidate."""
        if self.variant.op == "view_loss":
            return self._view_loss(name)
        provider = provider_of(name)
        score = provider.load(self.device)
        assert self.want is not None
        if provider.name not in self.errors:
            self.errors[provider.name] = gate.hold(score, self.want)
        self.errors[name] = self.errors[provider.name]
        if self.variant.op == "linear_logprob":
            return self._linear_logprob(score)
        return self._roma_loss(name, score)

    @property
    def yardstick(self) -> Run:
        """What the machine can do, timed among the candidates.

        One product of all rows with the head, in the inputs' dtype; for the view loss, one expm1 of
        all log-probs.
        """
        if self.variant.op == "view_loss":
            logp = self.loss["logp"]
            return lambda: (torch.expm1(logp), None)[1]
        rows, weight = self.case.rows, self.case.weight

        def run() -> None:
            for part in rows.split(1024):
                torch.mm(part, weight.T)

        return run

    @property
    def active_rows(self) -> int:
        """Rows with a gradient: in the loss, those whose coefficient is not 0."""
        rows = len(self.case.labels)
        if self.variant.phase == "forward":
            return 0
        if self.variant.op == "linear_logprob":
            return int((_upstream(self.variant, rows, self.device) != 0).sum())
        return int((_coefficients(self.loss["logp"], self.loss) != 0).sum())

    @property
    def flop(self) -> float:
        """What must be computed: 2·D·V for every row, and 4·D·V for every row with a gradient.

        No recompute is counted, whoever does one.
        """
        if self.variant.op == "view_loss":
            return 0.0
        by_row = 2.0 * self.variant.depth * self.variant.vocab
        return by_row * (len(self.case.labels) + 2 * self.active_rows)

    def executed(self) -> float:
        """FLOP of the products that ours really did."""
        run = self.run(OURS)
        with listen() as reports:
            run()
        return float(sum(report.flop for report in reports))

    def _linear_logprob(self, score: Score) -> Run:
        case, upstream = self.case, _upstream(self.variant, len(self.case.labels), self.device)

        def forward() -> None:
            with torch.no_grad():
                score(case.rows, case.weight, case.labels)

        def both() -> None:
            rows, weight = (x.detach().requires_grad_() for x in (case.rows, case.weight))
            logp = score(rows, weight, case.labels)
            logp.backward(upstream.to(logp.dtype))

        return forward if self.variant.phase == "forward" else both

    def _roma_loss(self, name: str, score: Score) -> Run:
        case, options = self.case, dict(self.loss)
        options.pop("logp")
        batch = options["mask"].shape

        def leaves() -> tuple[Tensor, Tensor]:
            return case.states.detach().requires_grad_(), case.weight.detach().requires_grad_()

        def ours() -> None:
            states, weight = leaves()
            padded = states.view(len(states), *batch, -1)
            roma.roma_loss(
                padded[0], padded[1:], weight, case.tokens.view(batch), **options
            ).loss.backward()

        def dense() -> None:
            states, weight = leaves()
            logp = score(states.flatten(0, 1), weight, case.labels).view(len(states), *batch)
            roma.roma_loss_from_logp(logp[0], logp[1:], **options).loss.backward()

        def active() -> None:
            states, weight = leaves()
            rows = states.flatten(0, 1)
            with torch.no_grad():
                logp = score(rows, weight, case.labels)
            g = _coefficients(logp.view(len(states), *batch), options).flatten()
            chosen = g.nonzero()[:, 0]
            if len(chosen):
                again = score(rows[chosen], weight, case.labels[chosen])
                again.backward(g[chosen].to(again.dtype))

        return ours if name == OURS else active if name.endswith(ACTIVE) else dense

    def _view_loss(self, name: str) -> Run:
        logp = self.loss["logp"]
        options = {n: x for n, x in self.loss.items() if n != "logp"}
        forms: dict[str, Callable[..., Tensor]] = {
            OURS: lambda clean, views: roma.roma_loss_from_logp(clean, views, **options).loss,
            "eager": lambda clean, views: plain_loss(clean, views, **options),
            "compile": torch.compile(lambda clean, views: plain_loss(clean, views, **options)),
        }
        loss = forms[name]
        want = float(forms["eager"](*(x.double() for x in (logp[0], logp[1:]))))
        got = float(loss(logp[0], logp[1:]))
        if not abs(got - want) <= 1e-4 * max(abs(want), 1e-3):
            raise gate.Wrong(f"loss {got:.6g}, float64 says {want:.6g}")

        def run() -> None:
            clean, views = (x.detach().requires_grad_() for x in (logp[0], logp[1:]))
            loss(clean, views).backward()

        return run


def bench_of(variant: Variant, device: str, *, states: str | None = None) -> Bench:
    """A variant's data on a device."""
    shape = variant.shape
    if variant.op == "view_loss":  # log-probs alone: the head's size does not matter
        shape = replace(shape, depth=8, vocab=64)
    return Bench(variant, device, make(shape, device, states=states))


def provider_of(name: str) -> Provider:
    """The provider behind a candidate's name."""
    return next(p for p in PROVIDERS if p.name == name.removesuffix(ACTIVE))


def plain_loss(
    clean: Tensor,
    views: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor,
    aux_view: Tensor,
    config: roma.RomaConfig,
) -> Tensor:
    """The default loss in the lines that one would write (docs/MATH.md, sections 1 to 3)."""
    lengths = mask.sum(-1).clamp(min=1)

    def clipped(logp: Tensor) -> Tensor:
        ratio = torch.exp((logp - old_logp).clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
        gains = advantages[:, None]
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = torch.maximum(-ratio * gains, -bounded * gains)
        if config.dual_clip is not None:
            ceiling = torch.where(gains < 0, -config.dual_clip * gains, torch.inf)
            loss = torch.minimum(loss, ceiling)
        return ((loss * mask).sum(-1) / lengths).mean()

    gap = (views - clean.detach()).clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    by_view = ((torch.expm1(gap) - gap) * mask).sum(-1) / lengths
    penalty = (by_view.amax(0) * correct).mean()
    sampled = views[aux_view, torch.arange(len(mask), device=mask.device)]
    return clipped(clean) + config.lambda_aux * clipped(sampled) + config.lambda_inv * penalty


def _loss_case(variant: Variant, case: Case) -> dict[str, Any]:
    """The constants of the loss for N = B·T tokens, and log-probs [K+1, B, T] near the old ones."""
    device = case.tokens.device
    generator = torch.Generator(device).manual_seed(2)
    length = min(variant.tokens, 16 if device.type == "cpu" else 256)
    sequences = variant.tokens // length
    with torch.no_grad():
        logp = roma.linear_logprob(case.rows, case.weight, case.labels).logp
    logp = logp.view(variant.views + 1, sequences, length)
    noise = torch.randn(logp[0].shape, generator=generator, device=device)
    numbers = torch.arange(sequences, device=device)
    return {
        "logp": logp,
        "mask": torch.ones(sequences, length, dtype=torch.bool, device=device),
        "advantages": torch.where(numbers % 2 == 0, 1.0, -1.0),
        "correct": numbers < variant.right * sequences,
        "old_logp": logp[0] + 0.02 * noise,
        "aux_view": torch.randint(
            max(variant.views, 1), (sequences,), generator=generator, device=device
        ),
        "config": roma.RomaConfig(worst_over=variant.worst_over),
    }


def _coefficients(logp: Tensor, options: dict[str, Any]) -> Tensor:
    """∂loss/∂logp [K+1, B, T]."""
    options = {n: x for n, x in options.items() if n != "logp"}
    leaf = logp.detach().float().requires_grad_()
    loss = roma.roma_loss_from_logp(leaf[0], leaf[1:], **options).loss
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def _upstream(variant: Variant, rows: int, device: str) -> Tensor:
    """One in 1/active rows has a gradient."""
    g = torch.zeros(rows, device=device)
    every = round(1 / variant.active)
    g[::every] = 1.0
    return g


__all__ = ["Bench", "Unavailable", "bench_of", "plain_loss", "provider_of"]
