"""`roma::view_loss`: the operator that PyTorch sees, for any back end with analytic coefficients.

The coefficients ∂loss/∂logp are formed with the loss; the backward scales them. Every tensor of a
`PackedBatch` is an argument, the options travel as one line of JSON.
"""

import functools
import importlib
import json
from typing import Any

import torch
from torch import Tensor

from roma_kernels.once import scaled
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.packed import METRICS, PackedBatch


@functools.lru_cache
def config_of(line: str) -> RomaConfig:
    """The options that `RomaConfig.line` holds."""
    return RomaConfig(**json.loads(line))


@torch.library.custom_op("roma::view_loss", mutates_args=())
def view_loss_op(
    logp: Tensor,
    view_logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    view_old_logp: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    correct: Tensor,
    aux_view: Tensor | None,
    total_sequences: Tensor,
    total_tokens: Tensor,
    total_correct: Tensor,
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics in the order of `METRICS`, ∂loss/∂logp, ∂loss/∂view_logp."""
    batch = PackedBatch(
        logp, view_logp, old_logp, ref_logp, view_old_logp, advantages, sequence, lengths, correct,
        aux_view, total_sequences, total_tokens, total_correct,
    )  # fmt: skip
    # On a CPU a few numbers a token are torch's; what is compiled there is the head.
    name = "triton_backend" if backend == "triton" else "torch_backend"
    module = importlib.import_module(f"roma_kernels.roma_loss.{name}")
    with torch.autocast(logp.device.type, enabled=False):
        return module.view_loss_fwd(batch, config_of(options))


@view_loss_op.register_fake
def _fake(
    logp: Tensor,
    view_logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    view_old_logp: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    correct: Tensor,
    aux_view: Tensor | None,
    total_sequences: Tensor,
    total_tokens: Tensor,
    total_correct: Tensor,
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = {"token": sequence.shape, "batch": ()}.get(config_of(options).worst_over, lengths.shape)
    return (
        logp.new_empty(()),
        lengths.new_empty(shape),
        logp.new_empty(len(METRICS)),
        logp.new_empty(logp.shape),
        logp.new_empty(view_logp.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, worst, metrics, dlogp, dview_logp = output
    ctx.save_for_backward(dlogp, dview_logp, *inputs[:2])
    ctx.mark_non_differentiable(worst, metrics, dlogp, dview_logp)


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dlogp, dview_logp, logp, view_logp = ctx.saved_tensors
    by_logp = scaled("roma_loss", dloss, dlogp, logp)
    return by_logp, scaled("roma_loss", dloss, dview_logp, view_logp), *[None] * 13


view_loss_op.register_autograd(_backward, setup_context=_setup_context)


def view_loss_of(
    batch: PackedBatch, config: RomaConfig, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, worst view and metrics in the order of `METRICS`."""
    return view_loss_op(
        *(getattr(batch, name) for name in PackedBatch.__dataclass_fields__),
        config.line,
        backend,
    )[:3]
