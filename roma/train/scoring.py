"""Log-probs of a policy without a graph: of rollouts on their images, and on views of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from roma import RomaConfig, linear_logprob, view_divergence
from roma.models.prefix.groups import Integers
from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch
from roma.train.parts import to_score
from roma.train.plan import Flags
from roma.train.states import States

Read = Callable[[UpdateBatch, Tensor, Tensor], Tensor]
"""From whole prompts, their rollouts' hidden states [b, T, D] (0 on masked positions) and the mean
state of each prompt's image tokens [p, D] (0 without images), to [b, …]."""


class Scores(NamedTuple):
    """Rollouts under the policy on their prompts' images, without a graph."""

    hidden: Tensor | None  # [B, T, D], 0 on masked positions
    logp: Tensor  # [B, T] nats, 0 on masked positions
    entropy: Tensor | None  # [B, T] nats, 0 on masked positions
    read: Tensor | None = None  # [B, …], what was made of hidden states, a few prompts at a time


class Scorer(nn.Module):
    """A policy, and how its log-probs are computed.

    Args:
        policy: the model.
        config: of the loss: gives temperature, softcap and what a divergence is.
        share_prompt: a prompt once for all its rollouts, where the policy can.
    """

    def __init__(self, policy: Policy, config: RomaConfig, *, share_prompt: bool = True) -> None:
        """Keeps all."""
        super().__init__()
        self.policy = policy
        self.config = config
        self.share_prompt = share_prompt and policy.shares_prompts

    def _scored(self, batch: UpdateBatch, limit: int | None) -> tuple[list[UpdateBatch], int]:
        sizes = self._states(batch).tokens_by_prompt(every_pair(batch))
        return to_score(batch, sizes.tolist(), limit)

    def _states(self, batch: UpdateBatch, *, images: bool = False) -> States:
        return States(self.policy, batch, share=self.share_prompt, images=images)

    def _padded(self, batch: UpdateBatch) -> list[Tensor]:
        """Hidden states [B, T, D] on the clean images, then on each view."""
        return self._run_all(self._states(batch))

    def _run_all(self, states: States) -> list[Tensor]:
        batch, every = states.batch, np.arange(len(states.batch.group))
        states.run(every_pair(batch))
        made = []
        for variant in range(len(batch.view_pixels) + 1):
            found = states.read(np.full_like(every, variant), every)
            hidden = found.new_zeros(*batch.mask.shape, found.shape[-1])
            hidden[batch.mask] = found
            made.append(hidden)
        return made

    @torch.no_grad()
    def score(
        self,
        batch: UpdateBatch,
        *,
        hidden: bool = False,
        entropy: bool = False,
        read: Read | None = None,
        limit: int | None = None,
    ) -> Scores:
        """Log-probs of a batch on its clean images, and hidden states or entropies if asked.

        Args:
            batch: any.
            hidden: whether to keep the hidden states, T·D numbers a rollout.
            entropy: whether to return entropies.
            read: makes what is kept of hidden states that are not, call by call of the model.
            limit: tokens that a call of the model takes at most; None: all at once.
        """
        parts, counted = self._scored(batch.without_views(), limit)
        asked = {"hidden": hidden, "entropy": entropy}
        found = [self._score(part, **asked, read=read) for part in parts][:counted]
        states = [part.hidden for part in found if part.hidden is not None]
        entropies = [part.entropy for part in found if part.entropy is not None]
        reads = [part.read for part in found if part.read is not None]
        return Scores(
            hidden=torch.cat(states) if hidden else None,
            logp=torch.cat([part.logp for part in found]),
            entropy=torch.cat(entropies) if entropy else None,
            read=torch.cat(reads) if read else None,
        )

    def _score(
        self, batch: UpdateBatch, *, hidden: bool, entropy: bool, read: Read | None
    ) -> Scores:
        made = self._states(batch, images=read is not None)
        (states,) = self._run_all(made)
        found = linear_logprob(
            states[batch.mask],
            self.policy.head_weight,
            batch.tokens[batch.mask],
            temperature=self.config.temperature,
            softcap=self.config.softcap,
            entropy=entropy,
        )
        h = None if found.entropy is None else _unpack(found.entropy, batch.mask)
        own = None if read is None else read(batch, states, made.image_states())
        return Scores(states if hidden else None, _unpack(found.logp, batch.mask), h, own)

    @torch.no_grad()
    def divergence(self, batch: UpdateBatch, *, limit: int | None = None) -> Tensor:
        """Divergence [K, B] of each view from the clean image, nats (`roma.view_divergence`)."""
        found = []
        parts, counted = self._scored(batch, limit)
        for part in parts:
            states, every = self._states(part), np.arange(len(part.group))
            states.run(every_pair(part))
            found.append(self._divergences(states, every))
        return torch.cat(found[:counted], dim=1)

    @torch.no_grad()
    def view_logp(self, batch: UpdateBatch) -> Tensor:
        """Log-probs [K, N] of all rollouts on each view, nats, without a graph; end to end."""
        states, every = self._states(batch), every_pair(batch)
        every[0] = False
        states.run(every)
        views, count = len(batch.view_pixels), len(batch.group)
        which, rollouts = np.repeat(np.arange(views) + 1, count), np.tile(np.arange(count), views)
        found = linear_logprob(  # one sweep of the head for all views
            states.read(which, rollouts),
            self.policy.head_weight,
            batch.tokens[batch.mask].repeat(views),
            temperature=self.config.temperature,
            softcap=self.config.softcap,
        )
        return found.logp.view(views, -1)

    def _divergences(self, states: States, rollouts: Integers) -> Tensor:
        """[K, n] nats of n rollouts, each run on its clean images and on every view."""
        batch = states.batch
        variants = len(batch.view_pixels) + 1
        rows = torch.from_numpy(rollouts).to(batch.tokens.device)
        tokens = batch.tokens[rows][batch.mask[rows]]
        which = np.repeat(np.arange(variants), len(rollouts))
        found = linear_logprob(  # one sweep of the head for all images
            states.read(which, np.tile(rollouts, variants)),
            self.policy.head_weight,
            tokens.repeat(variants),
            temperature=self.config.temperature,
            softcap=self.config.softcap,
        )
        return self._divergence(found.logp.view(variants, -1), states.lengths[rollouts])

    def _divergence(self, logp: Tensor, lengths: Integers) -> Tensor:
        """[K, B] from log-probs [K + 1, N] of whole rollouts, laid end to end."""
        return view_divergence(
            logp[0],
            logp[1:],
            torch.ones_like(logp[0], dtype=torch.bool),
            cu_seqlens=ends_of(lengths).to(logp.device),
            config=self.config,
        )


def every_pair(batch: UpdateBatch) -> Flags:
    """[K + 1, B]: every rollout on every image."""
    return np.ones((len(batch.view_pixels) + 1, len(batch.group)), dtype=bool)


def ends_of(lengths: Integers) -> Tensor:
    """[B + 1] int32: where rollouts of such lengths begin, laid end to end, and the end."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(torch.int32)


def _unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the counted positions [N] as [B, T], 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
