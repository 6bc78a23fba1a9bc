"""How far a policy diverges on changed images: of views without a graph, or with one to the pixels.

Log-probs on the clean images are taken once. A pass runs a view's rollouts alone: of a prompt the
right ones, or all if none is right, as `roma.train.views.hardest` counts them. The weights are
frozen in it, so that no gradient of a weight is formed.

On several ranks the passes are as many on each. A rank with fewer, or without an image, runs a
stand-in of one grey image, since a layer that it left out would leave the others waiting.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from roma import linear_logprob
from roma.models.qwen_vl import Policy
from roma.train import ranks
from roma.train.batch import UpdateBatch, micro_batches
from roma.train.plan import Flags
from roma.train.scoring import Scorer
from roma.train.states import States

T = TypeVar("T")
Call = Callable[..., Any]
"""`call(function, *args)`: runs it where the weights are whole (`Engine.call`)."""


class Part(NamedTuple):
    """What a call of the model takes of a batch."""

    prompts: list[int]
    """Numbers of its prompts in the batch; none: there for another rank's sake."""
    batch: UpdateBatch
    clean: Tensor
    """[b, T] nats: log-probs on the clean images, 0 on masked positions."""
    counted: Tensor
    """[b] bool: rollouts that are run."""


class Probe:
    """Divergence of views of a batch's prompts, from log-probs on the clean images taken once.

    Args:
        scorer: the policy; its configuration says what a divergence is.
        batch: P prompts and their rollouts, without views.
        counted: [P, G] bool: rollouts to average over; of a prompt that has none, all.
        views: K, of every pass.
        call: runs a function where the weights are whole.
        limit: tokens of the text model that a call takes at most, those of all views together.
    """

    def __init__(
        self,
        scorer: Scorer,
        batch: UpdateBatch,
        counted: Tensor,
        *,
        views: int,
        call: Call | None = None,
        limit: int | None = None,
    ) -> None:
        """Takes the log-probs on the clean images: one pass without a graph."""
        self.scorer, self.batch, self.views = scorer, batch.without_views(), views
        self._call: Call = call or _directly
        self.counted = counted | ~counted.any(1, keepdim=True)  # [P, G]
        clean: Tensor = self._call(scorer.score, self.batch, limit=limit).logp
        self._parts = self._cut(clean, limit)

    @property
    def policy(self) -> Policy:
        """The model."""
        return self.scorer.policy

    def divergence(self, pixels: Sequence[Tensor]) -> Tensor:
        """[K, P] nats of K views of all prompts' images; 0 for a prompt without one.

        One pass without a graph, of the rollouts that count.

        Args:
            pixels: K of [Σ gh·gw, C], as in `UpdateBatch.view_pixels`.
        """
        found = self._nothing()
        for part in self._parts:
            values = self._call(self._without_graph, part, self._own(part, pixels))
            if part.prompts:
                found[:, part.prompts] = self._mean(values, part)
        return found

    def gradient(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same, and the gradient of its sum by the pixels, K of [Σ gh·gw, C].

        One pass with a graph to the pixels. No weight has a gradient, during it or after.
        """
        found, grads = self._nothing(), [torch.zeros_like(own) for own in pixels]
        with _frozen(self.policy):
            for part in self._parts:
                values, made = self._call(self._with_graph, part, self._own(part, pixels))
                if not part.prompts:
                    continue
                found[:, part.prompts] = self._mean(values, part)
                where = self._patches(part.prompts)
                for own, grad in zip(grads, made, strict=True):
                    own[where] = grad.to(own.dtype)
        return found, grads

    def _nothing(self) -> Tensor:
        return torch.zeros(self.views, len(self.batch.prompts.images), device=self.policy.device)

    def _cut(self, clean: Tensor, limit: int | None) -> list[Part]:
        """The prompts with an image and a rollout to run, in calls; as many on every rank."""
        batch, run = self.batch, self.counted & self.batch.mask.any(1).view_as(self.counted)
        seen = torch.tensor([bool(own) for own in batch.prompts.images], device=run.device)
        own = torch.nonzero(run.any(1) & seen).flatten().tolist()
        parts: list[list[int]] = []
        if own:
            wanted = self._wanted(run.flatten() & seen[batch.group])
            sizes = self._states(batch).tokens_by_prompt(wanted)[own].tolist()
            cuts = micro_batches(sizes, limit or sum(sizes))
            parts = [[own[i] for i in cut] for cut in cuts]
        rows = torch.arange(len(batch.group), device=run.device).view_as(self.counted)
        made = []
        for prompts in parts:
            some = rows[prompts].flatten()
            made.append(Part(prompts, batch.select(prompts), clean[some], run[prompts].flatten()))
        missing = ranks.most(len(made)) - len(made)
        return made + [self._stand_in] * missing

    @cached_property
    def _stand_in(self) -> Part:
        """A grey image, and a completion of one token."""
        block = self.policy.processor.image_processor
        side = 2 * block.patch_size * block.merge_size
        grey = np.full((side, side, 3), 128, np.uint8)
        prompts, device = self.policy.encode_prompts(["<image>"], [[grey]]), self.policy.device
        one = torch.ones(1, 1, dtype=torch.bool, device=device)
        like = replace(
            self.batch,
            prompts=prompts,
            group=torch.zeros(1, dtype=torch.int64, device=device),
            tokens=prompts.input_ids[:, -1:],
            mask=one,
            advantages=torch.zeros(1, device=device),
            correct=torch.zeros(1, dtype=torch.bool, device=device),
            old_logp=None,
            ref_logp=None,
            rollout_weight=None,
            clean_features=None,
        )
        return Part([], like, torch.zeros(1, 1, device=device), one[0])

    def _own(self, part: Part, pixels: Sequence[Tensor]) -> list[Tensor]:
        """K views of a part's images."""
        if not part.prompts:
            return [part.batch.prompts.pixel_values] * self.views
        return [self.batch.prompts.gather(own, part.prompts) for own in pixels]

    def _patches(self, prompts: Sequence[int]) -> Tensor:
        """Places of the prompts' patches in `pixel_values`."""
        device = self.batch.prompts.pixel_values.device
        found = [self.batch.prompts.patches(p) for p in prompts]
        return torch.cat([torch.arange(s.start, s.stop, device=device) for s in found])

    def _mean(self, values: Tensor, part: Part) -> Tensor:
        """[K, p] from [K, b]: the mean over the rollouts that count; those not run are 0."""
        counted = self.counted[part.prompts]
        return values.view(self.views, *counted.shape).sum(-1) / counted.sum(-1)

    @torch.no_grad()
    def _without_graph(self, part: Part, pixels: list[Tensor]) -> Tensor:
        return self._values(part, pixels)

    def _with_graph(self, part: Part, pixels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            leaves = [own.detach().clone().requires_grad_() for own in pixels]
            values = self._values(part, leaves)
            by_prompt = values.view(self.views, len(part.batch.prompts.images), -1).sum(-1)
            counted = self.counted[part.prompts].sum(-1) if part.prompts else 1
            grads = torch.autograd.grad((by_prompt / counted).sum(), leaves)
        return values.detach(), list(grads)

    def _values(self, part: Part, pixels: list[Tensor]) -> Tensor:
        """[K, b] nats of the rollouts that are run, 0 of the others."""
        policy, config = self.policy, self.scorer.config
        weight = policy.head_weight  # where it is sharded, read first on every rank
        batch = replace(part.batch, view_pixels=pixels)
        states = self._states(batch)
        states.run(self._wanted(part.counted))
        rollouts = np.flatnonzero(part.counted.numpy(force=True))
        rows = torch.from_numpy(rollouts).to(batch.tokens.device)
        mask = batch.mask[rows]
        which = np.repeat(np.arange(self.views) + 1, len(rollouts))
        view = linear_logprob(  # one sweep of the head for all views
            states.read(which, np.tile(rollouts, self.views)),
            weight,
            batch.tokens[rows][mask].repeat(self.views),
            temperature=config.temperature,
            softcap=config.softcap,
        ).logp.view(self.views, -1)
        gap = view - part.clean[rows][mask]
        gap = gap if config.penalty_ratio == "view/clean" else -gap
        gap = gap.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
        each = gap.new_zeros(self.views, *mask.shape)
        each[:, mask] = torch.expm1(gap) - gap
        found = gap.new_zeros(self.views, len(part.counted))
        found[:, rows] = each.sum(-1) / mask.sum(-1)
        return found

    def _states(self, batch: UpdateBatch) -> States:
        return States(self.policy, batch, share=self.scorer.share_prompt)

    def _wanted(self, counted: Tensor) -> Flags:
        """[K + 1, B]: the rollouts that count, on every view."""
        own = counted.numpy(force=True)
        return np.concatenate([np.zeros_like(own)[None], np.tile(own, (self.views, 1))])


def _directly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)


@contextmanager
def _frozen(policy: Policy) -> Iterator[None]:
    """Within it no weight asks for a gradient."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
