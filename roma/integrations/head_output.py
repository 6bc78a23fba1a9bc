"""What a fused head returns where TRL is not imported: the fields of TRL's own class."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class FusedHeadOutput(ModelOutput):
    """Per-token results of a forward with `fused_lm_head=True`; T' = S − 1, or S by shift_labels.

    Attributes:
        loss: 0-dim, −Σ log_probs over num_items_in_batch or the counted labels (1 at least), plus
            the model's own share of `aux_loss`.
        log_probs: [B, T'] fp32 in nats, ≤ 0; 0 where the label is −100. Differentiable.
        entropy: [B, T'] fp32 in nats, or None. Differentiable.
        log_sum_sq_probs: [B, T'] log Σ_v p_v², or None. A constant.
        mean_logits: [B, T'] mean of the logits over τ, or None. A constant.
        is_top1: [B, T'] bool, whether no token is likelier than the label, or None.
        label_mask: [B, T'] bool, True where the label is not −100.
        aux_loss: 0-dim, load balancing of a mixture of experts, or None.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
