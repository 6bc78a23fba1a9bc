"""One forward of the update: clean pass, K view passes and the loss, inside one module.

Everything that reads a weight happens in `UpdateStep.forward`, the head included, so that whatever
wraps the module (DDP, FSDP, ZeRO-3) sees each use of each parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from roma.models.qwen_vl import Policy, PromptBatch
from roma_kernels.linear_logprob.api import linear_logprob
from roma_kernels.roma_loss.api import RomaLoss, roma_loss, view_divergence
from roma_kernels.roma_loss.config import RomaConfig


@dataclass(frozen=True)
class UpdateBatch:
    """Some prompts with all their rollouts, and what the loss needs to know of them."""

    prompts: PromptBatch
    view_pixels: list[Tensor]  # K views of all the prompts' images, each [Σ gh·gw, C]
    rows: Tensor  # [B] int64: the prompt of each rollout
    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B]
    correct: Tensor  # [B] bool
    aux_view: Tensor | None  # [B] int64
    old_logp: Tensor | None  # [B, T]; None: this very policy sampled, its log-probs are taken
    total_sequences: int  # over all micro-batches of the optimizer step, as are the next two
    total_tokens: int
    total_correct: int


class UpdateStep(nn.Module):
    """The trainable module: a policy and the loss on it.

    Args:
        policy: the model.
        config: of the loss.
    """

    def __init__(self, policy: Policy, config: RomaConfig) -> None:
        """Keeps both."""
        super().__init__()
        self.policy = policy
        self.config = config

    def forward(self, batch: UpdateBatch) -> RomaLoss:
        """The loss of a micro-batch.

        Rollouts of a prompt that say the same share their passes (short answers repeat often):
        hidden states are computed per distinct (prompt, completion) and handed to every such row,
        which sums their gradients. Exact.
        """
        hidden, *view_hidden = self._hidden(batch)
        old_logp = batch.old_logp
        if old_logp is None:
            old_logp = self._logp(hidden.detach(), batch)
        return roma_loss(
            hidden,
            torch.stack(view_hidden) if view_hidden else None,
            self.policy.head_weight,
            batch.tokens,
            mask=batch.mask,
            advantages=batch.advantages,
            correct=batch.correct,
            old_logp=old_logp,
            aux_view=batch.aux_view,
            total_sequences=batch.total_sequences,
            total_tokens=batch.total_tokens,
            total_correct=batch.total_correct,
            config=self.config,
        )

    def _hidden(self, batch: UpdateBatch) -> Iterator[Tensor]:
        """Hidden states [B, T, D] on the clean images, then on each view."""
        rows, tokens, mask, inverse = distinct_rows(batch.rows, batch.tokens, batch.mask)
        images, views = len(batch.prompts.grids), len(batch.view_pixels)
        pixels = torch.cat([batch.prompts.pixel_values, *batch.view_pixels])
        features = self.policy.image_features(pixels, batch.prompts.grids.repeat(views + 1, 1))
        for view in range(views + 1):
            own = features.part(view * images, images)
            yield self.policy.completion_hidden(batch.prompts, own, rows, tokens, mask)[inverse]

    @torch.no_grad()
    def old_logp(self, batch: UpdateBatch) -> Tensor:
        """Log-probs [B, T] of the rollouts on their clean images, 0 on masked positions."""
        return self._logp(next(self._hidden(replace(batch, view_pixels=[]))), batch)

    @torch.no_grad()
    def divergence(self, batch: UpdateBatch) -> Tensor:
        """Divergence [K, B] of each view from the clean image, nats (`roma.view_divergence`)."""
        logp, *view_logp = (self._logp(hidden, batch) for hidden in self._hidden(batch))
        return view_divergence(logp, torch.stack(view_logp), batch.mask, config=self.config)

    @torch.no_grad()
    def _logp(self, hidden: Tensor, batch: UpdateBatch) -> Tensor:
        scored = linear_logprob(
            hidden[batch.mask],
            self.policy.head_weight,
            batch.tokens[batch.mask],
            temperature=self.config.temperature,
            softcap=self.config.softcap,
        )
        return hidden.new_zeros(batch.mask.shape, dtype=scored.logp.dtype).masked_scatter(
            batch.mask, scored.logp
        )


def distinct_rows(
    rows: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The distinct (prompt, completion) pairs of [B] rollouts.

    Returns:
        Prompt [U], tokens [U, T] and mask [U, T] of each, and for every rollout [B] which one it
        is.

    Example:
        >>> tokens = torch.tensor([[5, 1], [5, 9], [5, 1]])
        >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
        >>> distinct_rows(torch.tensor([0, 0, 0]), tokens, mask)[3]
        tensor([1, 0, 1])
    """
    keys = torch.cat([rows[:, None], tokens.masked_fill(~mask, -1)], dim=1)
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    on = unique[:, 1:] >= 0
    return unique[:, 0], unique[:, 1:].clamp(min=0), on, inverse
