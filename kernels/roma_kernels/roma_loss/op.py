"""`combine`: K+1 log-probs per token → loss, worst views, metrics; one operator for any back end.

    coefficients = ∂loss/∂logp [M], ∂loss/∂view_logp [K, M]

The coefficients are formed with the loss; the backward scales them. A back end provides `combine`
of a `Batch` and the options.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roma_kernels.differentiation import no_gradients, refuse_transforms, scaled
from roma_kernels.products import as_written
from roma_kernels.roma_loss.batch import METRICS, Batch, Constants, first_view
from roma_kernels.roma_loss.config import RomaConfig, decoded
from roma_kernels.roma_loss.reference import roma_loss_reference


class Combined(NamedTuple):
    """The loss of a batch and what a trainer logs of it."""

    loss: Tensor
    """0-dim, differentiable in the log-probs."""
    worst_view: Tensor
    """int64: [B]; [M] for worst_over "token"; 0-dim for "batch"."""
    metrics: Tensor
    """[len(METRICS)], in that order."""


def combine(
    logp: Tensor,
    view_logp: Tensor,
    constants: Constants,
    config: RomaConfig,
    backend: str,
    *,
    entropy: Tensor | None = None,
) -> Combined:
    """The loss of log-probs [M] and [K, M] (docs/MATH.md sections 2 and 3).

    For callers who have checked every argument and chosen the back end; with an entropy [M] if
    entropy_coef > 0.
    """
    if backend == "reference":
        # Not as a decorator, which imports torch's compiler with this module.
        by_reference = torch.compiler.disable(_combine_by_reference, reason="it is for tests")
        return by_reference(logp, view_logp, constants.tensors(), config, entropy)
    refuse_transforms({"logp": logp, "view_logp": view_logp})
    found = combine_op(
        logp, view_logp, constants.tensors(), options=config.encoded(), backend=backend
    )
    combined = Combined(*found[:3])
    return combined if entropy is None else _with_entropy(combined, entropy, constants, config)


def _with_entropy(
    combined: Combined, entropy: Tensor, constants: Constants, config: RomaConfig
) -> Combined:
    """Less η·mean H: one sum, whose gradient is one number for all tokens. PyTorch makes both."""
    counted = torch.arange(len(entropy), device=entropy.device) < constants.lengths.sum()
    mean = torch.where(counted, entropy, 0).sum() / constants.total_tokens.clamp(min=1)
    bonus = config.entropy_coef * mean
    by_name = dict(zip(METRICS, combined.metrics.unbind(), strict=True))
    by_name |= {"loss": by_name["loss"] - bonus.detach(), "entropy": mean.detach()}
    metrics = torch.stack([by_name[name] for name in METRICS])
    return Combined(combined.loss - bonus, combined.worst_view, metrics)


def _combine_by_reference(
    logp: Tensor,
    view_logp: Tensor,
    constants: list[Tensor | None],
    config: RomaConfig,
    entropy: Tensor | None,
) -> Combined:
    batch = Batch.of(logp, view_logp, constants)
    found = roma_loss_reference(batch, config, entropy=entropy)
    metrics = torch.stack([found.metrics[name].detach().to(logp.dtype) for name in METRICS])
    return Combined(found.loss, found.worst_view, metrics)


@torch.library.custom_op("roma::combine", mutates_args=())
def combine_op(
    logp: Tensor,
    view_logp: Tensor,
    constants: Sequence[Tensor | None],
    *,
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics in the order of `METRICS`, ∂loss/∂logp, ∂loss/∂view_logp.

    Args:
        logp: [M].
        view_logp: [K, M].
        constants: `Constants.tensors`.
        options: `RomaConfig.encoded`.
        backend: "triton"; any other is PyTorch: on a CPU the head alone is worth compiling.
    """
    name = "triton_backend" if backend == "triton" else "torch_backend"
    module = importlib.import_module(f"roma_kernels.roma_loss.{name}")
    with as_written(logp):
        return module.combine(Batch.of(logp, view_logp, list(constants)), decoded(options))


@combine_op.register_fake
def _fake(
    logp: Tensor,
    view_logp: Tensor,
    constants: Sequence[Tensor | None],
    *,
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = Batch.of(logp, view_logp, list(constants))
    return (
        logp.new_empty(()),
        first_view(batch, decoded(options)),
        logp.new_empty(len(METRICS)),
        logp.new_empty(logp.shape),
        logp.new_empty(view_logp.shape),
    )


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, worst_view, metrics, dlogp, dview_logp = output
    logp, view_logp, constants = inputs
    ctx.save_for_backward(dlogp, dview_logp, logp, view_logp)
    ctx.of_constants = no_gradients(constants)
    ctx.mark_non_differentiable(worst_view, metrics, dlogp, dview_logp)


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    dlogp, dview_logp, logp, view_logp = ctx.saved_tensors
    by_logp = scaled("roma_loss", dloss, dlogp, logp)
    by_view_logp = scaled("roma_loss", dloss, dview_logp, view_logp)
    return by_logp, by_view_logp, ctx.of_constants


combine_op.register_autograd(_backward, setup_context=_setup_context)
