"""roma_loss_from_logp, forward and backward, against plain PyTorch and torch.compile of it."""

from collections.abc import Callable

import torch
from torch import Tensor

import roma
from bench import data, gate
from bench.loss_case import loss_case, plain_coefficients, plain_loss
from bench.measure import Check, Run
from bench.providers import OURS
from bench.variants import Variant


class ViewLossBench:
    """roma_loss_from_logp, forward and backward."""

    flop = 0.0
    names = (OURS, "eager", "compile")

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
        """A form of the loss, held to its value in float64 and to autograd; fp32 costs 1e-7."""
        form = self._form(name)
        clean, views = self.logp[0], self.logp[1:]
        want = float(plain_loss(clean.double(), views.double(), **self.options))
        slopes = plain_coefficients(self.logp, self.options)

        def hold(loss: Tensor, dclean: Tensor | None, dviews: Tensor | None) -> None:
            off = abs(float(loss) - want)
            gate.bound("loss", off, 1e-5 * max(abs(want), 1.0))
            if dclean is None or dviews is None:
                raise gate.Wrong("a gradient is missing")
            found = torch.cat([dclean[None], dviews])
            gate.bound("dlogp", gate.relative(found.flatten(0, 1), slopes.flatten(0, 1)), 1e-3)

        def run() -> Check:
            mine, others = (x.detach().requires_grad_() for x in (clean, views))
            loss = form(mine, others, **self.options)
            loss.backward()
            return lambda: hold(loss.detach(), mine.grad, others.grad)

        run()()
        return run

    def _form(self, name: str) -> Callable[..., Tensor]:
        if name == "eager":
            return plain_loss
        if name == "compile":
            compiled: Callable[..., Tensor] = torch.compile(plain_loss)
            return compiled
        return lambda clean, views, **named: roma.roma_loss_from_logp(clean, views, **named).loss

    def describe(self) -> dict[str, float]:
        """There is no head to describe."""
        return {}

    def columns(self, name: str) -> dict[str, str]:
        """Nothing else."""
        return {}
