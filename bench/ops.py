"""The measured ops: from a variant and a provider to a call that can be timed.

`run` gives the call, or raises `Unavailable` or `Wrong`: a provider's log-probs and gradients are
compared with float64 first (gate.py), and what a call makes is held to the same limits.

For the whole loss every provider of log-probs is completed by `roma_loss_from_logp`, in two ways:

    dense    log-probs of all (K+1)·N rows, roma_loss_from_logp, backward through all of them
    active   log-probs of all rows without a graph, the loss's coefficients, then the provider's
             forward and backward on the rows whose coefficient is not 0, as a careful user of that
             provider would do
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

import roma
from bench import data, gate
from bench.loss_case import chunked_gradients, loss_case, plain_coefficients, plain_loss
from bench.measure import Check, Run
from bench.own import OTHERS, OWN
from bench.providers import OURS, PROVIDERS, Provider, Score
from bench.update_step import step
from bench.variants import HEAD, Variant

AMONG = {
    "few": (OURS, "roma torch", "naive fp32", "torch fused", "liger", "cce", "trl"),
    "core": (OURS, "roma torch", "naive fp32", "torch fused"),
}
# Of minutes on a card; forms of others that are slow there, or take long to compile.
NOT_ON_A_CARD = ("compile", "cce exact", "liger", "verl chunked")
ACTIVE = " active"
LIGER_GRPO = "liger grpo"  # a whole loss, of the clean image alone
COMPLETION = "roma_loss_from_logp"
BASE = {"update_step": "grpo"}
"""Whose time ratios are over, by op, where it is not ours."""
Tell = Callable[[str], None]


class Bench(Protocol):
    """A variant with its data."""

    variant: Variant
    errors: dict[str, gate.Errors]
    flop: float
    """FLOP that must be computed, without any recompute; 0 where products are not what is timed."""

    @property
    def yardstick(self) -> Run:
        """A measure of the machine, timed among the candidates."""

    def package(self, name: str) -> str:
        """The distribution whose version stands in a candidate's row."""

    def run(self, name: str) -> Run:
        """One call of a candidate."""

    def describe(self) -> dict[str, float]:
        """Statistics of the data."""

    def columns(self, name: str) -> dict[str, str]:
        """What else stands in a candidate's row."""


class HeadBench:
    """linear_logprob: log-probs of the (K+1)·N rows of a case."""

    def __init__(self, variant: Variant, device: str, hold: bool, tell: Tell) -> None:
        """`hold`: whether a provider is compared with float64; `tell` hears what it is doing."""
        self.variant = variant
        self.device = device
        self.tell = tell
        self.case = data.make(variant.shape, device, states=variant.states)
        self.errors: dict[str, gate.Errors] = {}
        self.want = gate.truth(self.case) if hold else None

    @property
    def flop(self) -> float:
        """2·D·V for every row, and 4·D·V for every row with a gradient."""
        by_row = 2.0 * self.variant.depth * self.variant.vocab
        return by_row * (len(self.case.labels) + 2 * self.active_rows)

    @cached_property
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

        def forward() -> Check | None:
            with torch.no_grad():
                logp = score(case.rows, case.weight, case.labels)
            return self._checked(logp)

        def both() -> Check | None:
            rows, weight = (x.detach().requires_grad_() for x in (case.rows, case.weight))
            logp = score(rows, weight, case.labels)
            logp.backward(upstream.to(logp.dtype))
            return self._checked(logp, rows.grad, lambda found: upstream)

        return self._by_plan(name, forward if self.variant.phase == "forward" else both)

    def describe(self) -> dict[str, float]:
        """Entropies and sizes of the logits."""
        return data.describe(self.case)

    def columns(self, name: str) -> dict[str, str]:
        """Nothing else."""
        return {}

    def _held(self, name: str) -> Score:
        provider = provider_of(name)
        score = provider.load(self.device)
        if self.want is not None:
            if provider.name not in self.errors:
                with _plan(name):
                    self.errors[provider.name] = gate.hold(score, self.want, self.tell)
            self.errors[name] = self.errors[provider.name]
        return score

    def _by_plan(self, name: str, run: Run) -> Run:
        def call() -> Check | None:
            with _plan(name):
                return run()

        return call if name in OTHERS else run

    def _checked(
        self,
        logp: Tensor,
        dstates: Tensor | None = None,
        upstream: Callable[[Tensor], Tensor] | None = None,
    ) -> Check | None:
        """What holds a call's results: log-probs of all rows, gradients by their states.

        `upstream` gives the gradients by the log-probs [K+1, N] that led to `dstates`.
        """
        want = self.want
        if want is None:
            return None
        shape = self.case.states.shape[:2]
        found = logp.detach().view(shape)

        def check() -> None:
            grads = None if dstates is None else dstates.view(*shape, -1)
            g = None if upstream is None else upstream(found).view(shape)
            gate.hold_call(want, found, grads, g)

        return check

    def _upstream(self) -> Tensor:
        """One row in 1/active has a gradient."""
        g = torch.zeros(len(self.case.labels), device=self.device)
        g[:: round(1 / self.variant.active)] = 1.0
        return g


class LossBench(HeadBench):
    """roma_loss, forward and backward."""

    def __init__(self, variant: Variant, device: str, hold: bool, tell: Tell) -> None:
        """As `HeadBench`."""
        super().__init__(variant, device, hold, tell)
        self.logp, self.options = loss_case(variant, self.case)
        self.completion = "auto"
        """The back end that completes the peers' log-probs; "torch" where ours fails."""

    @cached_property
    def active_rows(self) -> int:
        """Rows whose coefficient is not 0."""
        return int((plain_coefficients(self.logp, self.options) != 0).sum())

    def package(self, name: str) -> str:
        """Its provider's."""
        return "liger-kernel" if name == LIGER_GRPO else super().package(name)

    def run(self, name: str) -> Run:
        """One call of our loss, of a peer's log-probs completed, or of a peer's own loss."""
        if name == LIGER_GRPO:
            return self._liger_grpo()
        score, case, options = self._held(name), self.case, self.options
        if name in OWN:
            return self._by_plan(name, lambda: self._ours(OWN[name].workspace))
        batch = options["mask"].shape

        def dense() -> Check | None:
            states, weight = self._leaves()
            logp = score(states.flatten(0, 1), weight, case.labels)
            self._complete(logp.view(len(states), *batch)).backward()
            return self._checked(logp, states.grad, self._coefficients)

        def active() -> Check | None:
            states, weight = self._leaves()
            rows = states.flatten(0, 1)
            with torch.no_grad():
                logp = score(rows, weight, case.labels)
            leaf = logp.view(len(states), *batch).float().requires_grad_()
            (g,) = (x.flatten() for x in torch.autograd.grad(self._complete(leaf), leaf))
            chosen = g.nonzero()[:, 0]
            if len(chosen):
                again = score(rows[chosen], weight, case.labels[chosen])
                again.backward(g[chosen].to(again.dtype))
            return self._checked(logp, states.grad, self._coefficients)

        return active if name.endswith(ACTIVE) else dense

    def hold_completion(self) -> None:
        """Compares what completes the peers' log-probs with the same in plain PyTorch."""
        leaf = self.logp.detach().requires_grad_()
        loss = self._complete(leaf)
        (found,) = torch.autograd.grad(loss, leaf)
        off = loss.detach() - plain_loss(self.logp[0], self.logp[1:], **self.options)
        gate.bound("loss", float(off.abs()), 1e-5)
        want = plain_coefficients(self.logp, self.options)
        gate.bound("coefficients", gate.relative(found.flatten(0, 1), want.flatten(0, 1)), 1e-3)

    def _complete(self, logp: Tensor) -> Tensor:
        """The loss from log-probs [K+1, B, T]."""
        return roma.roma_loss_from_logp(
            logp[0], logp[1:], **self.options, backend=self.completion
        ).loss

    def _coefficients(self, logp: Tensor) -> Tensor:
        """Of a call's own log-probs [K+1, N]: rounded ones may have another worst view."""
        return plain_coefficients(logp.view_as(self.logp), self.options).flatten(1)

    def _leaves(self) -> tuple[Tensor, Tensor]:
        return tuple(x.detach().requires_grad_() for x in (self.case.states, self.case.weight))

    def _ours(self, workspace: int | None = None) -> Check | None:
        states, weight = self._leaves()
        batch = self.options["mask"].shape
        padded = states.view(len(states), *batch, -1)
        tokens = self.case.tokens.view(batch)
        out = roma.roma_loss(
            padded[0], padded[1:], weight, tokens, **self.options, workspace=workspace
        )
        out.loss.backward()
        logp = torch.cat([out.logp.detach()[None], out.view_logp.detach()])
        return self._checked(logp, states.grad, self._coefficients)

    def _liger_grpo(self) -> Run:
        """GRPO's loss on the clean image, compared with plain PyTorch in fp32."""
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

        def check(loss: Tensor) -> None:
            want = plain_loss(self.logp[0], self.logp[1:], **options)
            assert self.want is not None
            gate.bound("loss", float((loss - want).abs()), self.want.limit)

        if self.want is not None:
            theirs = self._leaves()
            check(call(*theirs))
            case, g = self.case, plain_coefficients(self.logp, options).flatten()
            mine = chunked_gradients(case.rows, case.weight, case.labels, g)
            for what, a, b in zip(("dhidden", "dweight"), theirs, mine, strict=True):
                gate.bound(what, gate.relative(a.grad.view_as(b), b), gate.GRADIENT)

        def run() -> Check | None:
            loss = call(*self._leaves())
            return None if self.want is None else lambda: check(loss)

        return run


def bench_of(
    variant: Variant, device: str, *, hold: bool = True, tell: Tell = lambda what: None
) -> Bench:
    """The bench of a variant, with its data on a device."""
    if variant.op in HEAD:
        return (HeadBench if variant.op == "linear_logprob" else LossBench)(
            variant, device, hold, tell
        )
    made: Bench = (
        step.UpdateStepBench(variant, device, hold)
        if variant.op == "update_step"
        else _other(variant.op)(variant, device)
    )
    return made


def _other(op: str) -> Any:
    """The class of an op without a large head; imported when used, for what it imports."""
    if op == "views":
        from bench.views import ViewsBench

        return ViewsBench
    from bench.view_loss import ViewLossBench

    return ViewLossBench


def names_of(variant: Variant) -> list[str]:
    """All candidates of a variant, ours first; without its data.

    Each peer of the whole loss stands there dense and active; our back ends skip inactive rows
    themselves.
    """
    if variant.op == "update_step":
        return step.names_of(variant)
    if variant.op not in HEAD:
        return list(_other(variant.op).names)
    every = [p.name for p in PROVIDERS]
    found = [name for name in every if name in AMONG.get(variant.among, every)]
    if variant.among == "card":
        found = [name for name in found if name not in NOT_ON_A_CARD]
        found[1:1] = OTHERS
    if variant.op == "roma_loss":
        found += [name + ACTIVE for name in found if not name.startswith(OURS)]
        found += [] if variant.views else [LIGER_GRPO]
    return found


def provider_of(name: str) -> Provider:
    """The provider behind a candidate's name."""
    if name in OTHERS:
        return OWN[name].provider
    return next(p for p in PROVIDERS if p.name == name.removesuffix(ACTIVE))


def _plan(name: str) -> AbstractContextManager[None]:
    return OWN[name].chosen() if name in OTHERS else nullcontext()
