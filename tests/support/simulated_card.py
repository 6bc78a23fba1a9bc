"""`roma.linear_logprob` and `roma.roma_loss` as a card with given matrix units would compute them.

bf16 and fp16 products are those of experiments.accumulator, forward and backward; fp32 products,
and all that stands around them, are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import roma
from experiments.accumulator.simulate import multiply
from roma.testing.matrix_unit import MatrixUnit
from roma_kernels.linear_logprob.api import TokenLogprobs


class _Logits(torch.autograd.Function):
    """h·Wᵀ [R, V] fp32; its gradients come from a dz that is rounded to the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, unit: MatrixUnit) -> Tensor:
        ctx.unit = unit
        ctx.save_for_backward(hidden, weight)
        return _product(hidden, weight, unit)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        # fp16 needs a loss scale.
        scale = 2.0 ** (8 - torch.frexp(dz.abs().max()).exponent.item()) if dz.any() else 1.0
        dz = (dz * scale).to(dtype)
        dhidden = _product(dz, weight.to(dtype).T, ctx.unit) / scale
        dweight = _product(dz.T, hidden.to(dtype).T, ctx.unit) / scale
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), None


def _product(left: Tensor, right: Tensor, unit: MatrixUnit) -> Tensor:
    if unit.multiplies(left, right):
        return multiply(left, right, unit)
    return left.float() @ right.float().T


class Card:
    """The public functions on it; `spoil` changes the logits, to see whether a test notices."""

    def __init__(self, unit: MatrixUnit, spoil: Any = None) -> None:
        self.unit = unit
        self.spoil = spoil

    def linear_logprob(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        entropy: bool = False,
    ) -> TokenLogprobs:
        z = _Logits.apply(hidden.reshape(-1, hidden.shape[-1]), weight, self.unit)
        z = z if bias is None else z + bias.float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / (temperature.reshape(-1, 1) if isinstance(temperature, Tensor) else temperature)
        z = z if self.spoil is None else self.spoil(z)
        lse = torch.logsumexp(z, 1)
        logp = z.gather(1, tokens.reshape(-1, 1))[:, 0] - lse
        mean = (torch.softmax(z, 1) * z).sum(1)
        found = (logp, lse.detach(), lse - mean)
        logp, lse, spread = (x.reshape(tokens.shape) for x in found)
        return TokenLogprobs(logp, lse, spread if entropy else None)

    def roma_loss(
        self,
        hidden: Tensor,
        view_hidden: Tensor | None,
        weight: Tensor,
        tokens: Tensor,
        *,
        mask: Tensor,
        config: roma.RomaConfig,
        bias: Tensor | None = None,
        **rest: Any,
    ) -> roma.RomaLoss:
        options = {"bias": bias, "temperature": config.temperature, "softcap": config.softcap}

        def whole(counted: Tensor) -> Tensor:
            return counted.new_zeros(mask.shape).masked_scatter(mask, counted)

        def score(states: Tensor) -> TokenLogprobs:
            return self.linear_logprob(states[mask], weight, tokens[mask], entropy=True, **options)

        views = [] if view_hidden is None else list(view_hidden)
        clean, view_logp = score(hidden), [whole(score(view).logp) for view in views]
        logp = whole(clean.logp)
        scored = torch.stack(view_logp) if views else logp.new_zeros(0, *mask.shape)
        if config.entropy_coef > 0:
            assert clean.entropy is not None  # asked for
            rest["entropy"] = whole(clean.entropy)
        return roma.roma_loss_from_logp(
            logp, scored, mask=mask, config=config, backend="torch", **rest
        )
