"""`view_loss`: K+1 log-probs of every counted token to loss, worst views and metrics."""

from typing import NamedTuple

from torch import Tensor

from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.op import view_loss_of
from roma_kernels.roma_loss.packed import METRICS, PackedBatch
from roma_kernels.roma_loss.reference import view_loss_reference


class ViewLoss(NamedTuple):
    """The loss, 0-dim, and what the trainer logs of it."""

    loss: Tensor
    worst_view: Tensor
    """int64 [B], [N] for worst_over "token", 0-dim for "batch"."""
    metrics: dict[str, Tensor]
    """Detached 0-dim tensors under the names of `METRICS`."""


def view_loss(batch: PackedBatch, config: RomaConfig, backend: str) -> ViewLoss:
    """The loss of a packed batch (docs/MATH.md sections 2 and 3).

    Differentiable in `batch.logp` and `batch.view_logp`. Its callers, `roma_loss` and
    `roma_loss_from_logp`, have checked every argument and
    resolved the back end.
    """
    if backend == "reference":
        loss, worst_view, by_name = view_loss_reference(batch, config)
        detached = {name: value.detach() for name, value in by_name.items()}
        return ViewLoss(loss, worst_view, detached)
    loss, worst_view, metrics = view_loss_of(batch, config, backend)
    return ViewLoss(loss, worst_view, dict(zip(METRICS, metrics.unbind(), strict=True)))


__all__ = ["METRICS", "ViewLoss", "view_loss"]
