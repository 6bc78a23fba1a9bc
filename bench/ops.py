"""The measured ops: from a variant and a provider to a call that can be timed.

`run` gives the call, or raises `Unavailable` or `Wrong`: a provider's log-probs and gradients are
compared with float64 first (gate.py).

For the whole loss every provider of log-probs is completed by `roma_loss_from_logp`, in two ways:

    dense    log-probs of all (K+1)·N rows, roma_loss_from_logp, backward through all of them
    active   log-probs of all rows without a graph, the loss's coefficients, then the provider's
             forward and backward on the rows whose coefficient is not 0, as a careful user of that
             provider would do
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import roma
from bench import data, gate
from bench.measure import Run
from bench.providers import OURS, PROVIDERS, Provider, Score
from bench.variants import Variant
from roma_kernels.products import listen

AMONG = {
    "few": (OURS, "roma torch", "naive fp32", "torch fused", "liger", "cce", "trl"),
    "core": (OURS, "roma torch", "naive fp32", "torch fused"),
}
ACTIVE = " active"
GRPO = roma.RomaConfig(lambda_inv=0.0)
LIGER_GRPO = "liger grpo"  # a whole loss, of the clean image alone


class Bench(Protocol):
    """A variant with its data."""

    variant: Variant
    errors: dict[str, gate.Errors]
    flop: float
    """FLOP that must be computed, without any recompute; 0 where products are not what is timed."""

    @property
    def names(self) -> Sequence[str]:
        """All candidates, ours first."""

    @property
    def yardstick(self) -> Run:
        """A measure of the machine, timed among the candidates."""

    def package(self, name: str) -> str:
        """The distribution whose version stands in a candidate's row."""

    def run(self, name: str) -> Run:
        """One call of a candidate."""

    def executed(self) -> float:
        """FLOP of the products that our kernels executed."""

    def describe(self) -> dict[str, float]:
        """Statistics of the data."""


class HeadBench:
    """linear_logprob: log-probs of the (K+1)·N rows of a case."""

    def __init__(self, variant: Variant, device: str, hold: bool) -> None:
        """`hold`: whether a provider is compared with float64 before it is timed."""
        self.variant = variant
        self.device = device
        self.case = data.make(variant.shape, device, states=variant.states)
        self.errors: dict[str, gate.Errors] = {}
        self.want = gate.truth(self.case) if hold else None

    @property
    def names(self) -> Sequence[str]:
        """The providers that this variant times."""
        every = [p.name for p in PROVIDERS]
        return [name for name in every if name in AMONG.get(self.variant.among, every)]

    @property
    def flop(self) -> float:
        """2·D·V for every row, and 4·D·V for every row with a gradient."""
        by_row = 2.0 * self.variant.depth * self.variant.vocab
        return by_row * (len(self.case.labels) + 2 * self.active_rows)

    @property
    def active_rows(self) -> int:
        """Rows with a gradient."""
        forward = self.variant.phase == "forward"
        return 0 if forward else int((self._upstream() != 0).sum())

    @property
    def yardstick(self) -> Run:
        """One product of all rows with the head, in the inputs' dtype."""
        rows, weight = self.case.rows, self.case.weight
        logits = weight.new_empty(min(1024, len(rows)), len(weight))

        def run() -> None:
            for part in rows.split(1024):
                torch.mm(part, weight.T, out=logits[: len(part)])

        return run

    def package(self, name: str) -> str:
        """Its provider's."""
        return provider_of(name).package

    def run(self, name: str) -> Run:
        """Forward without a graph, or forward and backward."""
        score, case, upstream = self._held(name), self.case, self._upstream()

        def forward() -> None:
            with torch.no_grad():
                score(case.rows, case.weight, case.labels)

        def both() -> None:
            rows, weight = (x.detach().requires_grad_() for x in (case.rows, case.weight))
            logp = score(rows, weight, case.labels)
            logp.backward(upstream.to(logp.dtype))

        return forward if self.variant.phase == "forward" else both

    def executed(self) -> float:
        """FLOP that our kernels report."""
        run = self.run(OURS)
        with listen() as reports:
            run()
        return float(sum(report.flop for report in reports))

    def describe(self) -> dict[str, float]:
        """Entropies and sizes of the logits."""
        return data.describe(self.case)

    def _held(self, name: str) -> Score:
        provider = provider_of(name)
        score = provider.load(self.device)
        if self.want is not None:
            if provider.name not in self.errors:
                self.errors[provider.name] = gate.hold(score, self.want)
            self.errors[name] = self.errors[provider.name]
        return score

    def _upstream(self) -> Tensor:
        """One row in 1/active has a gradient."""
        g = torch.zeros(len(self.case.labels), device=self.device)
        g[:: round(1 / self.variant.active)] = 1.0
        return g


class LossBench(HeadBench):
    """roma_loss, forward and backward."""

    def __init__(self, variant: Variant, device: str, hold: bool) -> None:
        """As `HeadBench`."""
        super().__init__(variant, device, hold)
        self.logp, self.options = loss_case(variant, self.case)

    @property
    def names(self) -> Sequence[str]:
        """Each peer dense and active; our back ends skip inactive rows themselves."""
        found = list(super().names)
        found += [name + ACTIVE for name in found if not name.startswith(OURS)]
        return found if self.variant.views else [*found, LIGER_GRPO]

    @property
    def active_rows(self) -> int:
        """Rows whose coefficient is not 0."""
        return int((coefficients(self.logp, self.options) != 0).sum())

    def package(self, name: str) -> str:
        """Its provider's."""
        return "liger-kernel" if name == LIGER_GRPO else super().package(name)

    def run(self, name: str) -> Run:
        """One call of our loss, of a peer's log-probs completed, or of a peer's own loss."""
        if name == LIGER_GRPO:
            return self._liger_grpo()
        if name == OURS:
            self._held(name)
            return lambda: self._ours(*self._leaves())
        score, case, options = self._held(name), self.case, self.options
        batch = options["mask"].shape

        def dense() -> None:
            states, weight = self._leaves()
            logp = score(states.flatten(0, 1), weight, case.labels).view(len(states), *batch)
            roma.roma_loss_from_logp(logp[0], logp[1:], **options).loss.backward()

        def active() -> None:
            states, weight = self._leaves()
            rows = states.flatten(0, 1)
            with torch.no_grad():
                logp = score(rows, weight, case.labels)
            g = coefficients(logp.view(len(states), *batch), options).flatten()
            chosen = g.nonzero()[:, 0]
            if len(chosen):
                again = score(rows[chosen], weight, case.labels[chosen])
                again.backward(g[chosen].to(again.dtype))

        return active if name.endswith(ACTIVE) else dense

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return tuple(x.detach().requires_grad_() for x in (self.case.states, self.case.weight))

    def _ours(self, states: Tensor, weight: Tensor) -> Tensor:
        batch = self.options["mask"].shape
        padded = states.view(len(states), *batch, -1)
        tokens = self.case.tokens.view(batch)
        loss = roma.roma_loss(padded[0], padded[1:], weight, tokens, **self.options).loss
        loss.backward()
        return loss.detach()

    def _liger_grpo(self) -> Run:
        """GRPO's loss on the clean image, compared with ours, which is compared with float64."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        options, config = self.options, self.options["config"]
        batch = options["mask"].shape
        form = LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            epsilon_low=config.clip_low,
            epsilon_high=config.clip_high,
            loss_type="grpo",
        )

        def call(states: Tensor, weight: Tensor) -> Tensor:
            loss: Tensor = form(
                states[0].view(*batch, -1),
                weight,
                self.case.tokens.view(batch),
                options["mask"].float(),
                options["advantages"],
                old_per_token_logps=options["old_logp"],
            )[0]
            loss.backward()
            return loss.detach()

        if self.want is not None:
            mine, theirs = self._leaves(), self._leaves()
            off = float((call(*theirs) - self._ours(*mine)).abs())
            if not off <= self.want.limit:
                raise gate.Wrong(f"its loss is off by {off:.2e}")
            for a, b in zip(theirs, mine, strict=True):
                off = gate.relative(a.grad, b.grad.double())
                if not off <= gate.GRADIENT:
                    raise gate.Wrong(f"its gradient is off by {off:.2e}")
        return lambda: (call(*self._leaves()), None)[1]


class ViewLossBench:
    """roma_loss_from_logp, forward and backward."""

    flop = 0.0
    names: Sequence[str] = (OURS, "eager", "compile")

    def __init__(self, variant: Variant, device: str) -> None:
        """Only log-probs are needed: they come from a small head."""
        self.variant = variant
        self.errors: dict[str, gate.Errors] = {}
        shape = data.Shape(variant.tokens, variant.views, 8, 64)
        self.logp, self.options = loss_case(variant, data.make(shape, device))

    @property
    def yardstick(self) -> Run:
        """expm1 of all log-probs."""
        return lambda: (torch.expm1(self.logp), None)[1]

    def package(self, name: str) -> str:
        """Ours, or torch."""
        return OURS if name == OURS else "torch"

    def run(self, name: str) -> Run:
        """A form of the loss, compared with its value in float64; fp32 rounding costs 1e-7."""
        forms: dict[str, Callable[..., Tensor]] = {
            OURS: lambda clean, views, **named: (
                roma.roma_loss_from_logp(clean, views, **named).loss
            ),
            "eager": plain_loss,
            "compile": torch.compile(plain_loss),
        }
        form, (clean, *_), views = forms[name], self.logp, self.logp[1:]
        want = float(plain_loss(clean.double(), views.double(), **self.options))
        got = float(form(clean, views, **self.options))
        if not abs(got - want) <= 1e-5 * max(abs(want), 1.0):
            raise gate.Wrong(f"loss {got:.6g}, float64 says {want:.6g}")

        def run() -> None:
            leaves = (x.detach().requires_grad_() for x in (clean, views))
            form(*leaves, **self.options).backward()

        return run

    def executed(self) -> float:
        """No products."""
        return 0.0

    def describe(self) -> dict[str, float]:
        """There is no head to describe."""
        return {}


def bench_of(variant: Variant, device: str, *, hold: bool = True) -> Bench:
    """The bench of a variant, with its data on a device."""
    if variant.op == "views":
        from bench.views import ViewsBench

        return ViewsBench(variant, device)
    if variant.op == "update_step":
        from bench.update_step import UpdateStepBench

        return UpdateStepBench(variant, device)
    if variant.op == "view_loss":
        return ViewLossBench(variant, device)
    return {"linear_logprob": HeadBench, "roma_loss": LossBench}[variant.op](variant, device, hold)


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
    """The default loss as one would write it (docs/MATH.md, sections 2 and 3)."""
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


def loss_case(variant: Variant, case: data.Case) -> tuple[Tensor, dict[str, Any]]:
    """Log-probs [K+1, B, T] of N = B·T tokens, and the loss's other arguments."""
    device = case.tokens.device
    generator = torch.Generator(device).manual_seed(2)
    length = min(variant.tokens, 16 if device.type == "cpu" else 256)
    sequences = variant.tokens // length
    with torch.no_grad():
        logp = roma.linear_logprob(case.rows, case.weight, case.labels).logp
    logp = logp.view(variant.views + 1, sequences, length)
    noise = torch.randn(logp[0].shape, generator=generator, device=device)
    numbers = torch.arange(sequences, device=device)
    sampled = torch.randint(max(variant.views, 1), (sequences,), generator=generator, device=device)
    return logp, {
        "mask": torch.ones(sequences, length, dtype=torch.bool, device=device),
        "advantages": torch.where(numbers % 2 == 0, 1.0, -1.0),
        "correct": numbers < variant.right * sequences,
        "old_logp": logp[0] + 0.02 * noise,
        "aux_view": sampled if variant.views else None,
        "config": roma.RomaConfig(worst_over=variant.worst_over) if variant.views else GRPO,
    }


def coefficients(logp: Tensor, options: dict[str, Any]) -> Tensor:
    """∂loss/∂logp [K+1, B, T]."""
    leaf = logp.detach().float().requires_grad_()
    loss = roma.roma_loss_from_logp(leaf[0], leaf[1:], **options).loss
    (found,) = torch.autograd.grad(loss, leaf)
    return found
