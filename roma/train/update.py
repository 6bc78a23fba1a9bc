"""The module whose forward uses every weight: policy, views and loss.

Everything that reads a weight happens in `PolicyLoss.forward`, the head included, so that whatever
wraps the module (DDP, FSDP, ZeRO-3) sees each use of each parameter.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from roma import RomaConfig, RomaLoss, TokenLogprobs, linear_logprob, roma_loss, view_divergence
from roma.models.qwen_vl import Policy
from roma.train.batch import Totals, UpdateBatch


class Scores(NamedTuple):
    """Rollouts under the policy on their prompts' images, without a graph."""

    hidden: Tensor  # [B, T, D]
    logp: Tensor  # [B, T] nats, 0 on masked positions
    entropy: Tensor | None  # [B, T] nats, 0 on masked positions


class PolicyLoss(nn.Module):
    """The trainable module: a policy and the loss on it.

    Args:
        policy: the model.
        config: of the loss. A batch without views has no view terms, whatever the lambdas are.
    """

    def __init__(self, policy: Policy, config: RomaConfig) -> None:
        """Keeps both."""
        super().__init__()
        self.policy = policy
        self.config = config
        self._clean = replace(config, lambda_inv=0.0, lambda_aux=0.0)

    def forward(self, batch: UpdateBatch, totals: Totals) -> RomaLoss:
        """The loss of a micro-batch; over those that share `totals` the losses add up.

        Equal completions of a prompt (short answers often repeat) are computed once: their hidden
        states go to every such row, and the rows' gradients add up. This is exact.
        """
        hidden, *view_hidden = self._hidden(batch)
        return roma_loss(
            hidden,
            torch.stack(view_hidden) if view_hidden else None,
            self.policy.head_weight,
            batch.tokens,
            mask=batch.mask,
            advantages=batch.advantages,
            correct=batch.correct,
            old_logp=batch.old_logp,
            aux_view=batch.aux_view,
            total_sequences=totals.sequences,
            total_tokens=totals.tokens,
            total_correct=totals.correct,
            config=self.config if view_hidden else self._clean,
        )

    @torch.no_grad()
    def score(self, batch: UpdateBatch, *, entropy: bool = False) -> Scores:
        """Hidden states and log-probs of a batch on its clean images, and entropies if asked."""
        hidden = next(self._hidden(batch.without_views()))
        found = self._head(hidden, batch, entropy=entropy)
        h = None if found.entropy is None else _unpack(found.entropy, batch.mask)
        return Scores(hidden, _unpack(found.logp, batch.mask), h)

    @torch.no_grad()
    def divergence(self, batch: UpdateBatch) -> Tensor:
        """Divergence [K, B] of each view from the clean image, nats (`roma.view_divergence`)."""
        logp, *view_logp = (self._logp(hidden, batch) for hidden in self._hidden(batch))
        return view_divergence(logp, torch.stack(view_logp), batch.mask, config=self.config)

    def _hidden(self, batch: UpdateBatch) -> Iterator[Tensor]:
        """Hidden states [B, T, D] on the clean images, then on each view."""
        group, tokens, mask, inverse = distinct_rows(batch.group, batch.tokens, batch.mask)
        images, views = len(batch.prompts.grids), len(batch.view_pixels)
        pixels = torch.cat([batch.prompts.pixel_values, *batch.view_pixels])
        features = self.policy.image_features(pixels, batch.prompts.grids.repeat(views + 1, 1))
        for variant in range(views + 1):
            own = features.part(variant * images, images)
            yield self.policy.completion_hidden(batch.prompts, own, group, tokens, mask)[inverse]

    @torch.no_grad()
    def _logp(self, hidden: Tensor, batch: UpdateBatch) -> Tensor:
        return _unpack(self._head(hidden, batch).logp, batch.mask)

    def _head(self, hidden: Tensor, batch: UpdateBatch, *, entropy: bool = False) -> TokenLogprobs:
        return linear_logprob(
            hidden[batch.mask],
            self.policy.head_weight,
            batch.tokens[batch.mask],
            temperature=self.config.temperature,
            softcap=self.config.softcap,
            entropy=entropy,
        )


def _unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the counted positions [N] as [B, T], 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def distinct_rows(
    group: Tensor, tokens: Tensor, mask: Tensor
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
    keys = torch.cat([group[:, None], tokens.masked_fill(~mask, -1)], dim=1)
    unique, inverse = torch.unique(keys, dim=0, return_inverse=True)
    on = unique[:, 1:] >= 0
    return unique[:, 0], unique[:, 1:].clamp(min=0), on, inverse
