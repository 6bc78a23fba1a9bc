"""Hidden states of (image variant, completion) pairs, whichever way the policy runs them.

Equal completions of a prompt (short answers often repeat) are run once: their states go to every
such rollout, and the rollouts' gradients add up. This is exact.

Where weights are sharded, a call of a module is a collective, and where gradients are averaged, a
weight without one leaves the other ranks waiting. So on several ranks the modules that a run calls
depend on K and the form alone: a completion or an image that nothing reads stands in for what a
rank does not have. Its gradients are exactly 0.
"""

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from roma.models.prefix import Group
from roma.models.prefix.groups import Integers, ranges
from roma.models.prompts import ImageFeatures
from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch
from roma.train.plan import Flags
from roma.train.ranks import ranks
from roma_kernels.errors import fail


class States:
    """What the calls of a policy gave, readable by pair.

    Args:
        policy: the model.
        batch: its prompts, views and B rollouts.
        share: a prompt once for all its rollouts; else a row for each completion.
        images: keep the mean state of each prompt's image tokens, too, on its clean images.
    """

    def __init__(
        self, policy: Policy, batch: UpdateBatch, *, share: bool, images: bool = False
    ) -> None:
        """Nothing is run yet."""
        self.policy, self.batch, self.share = policy, batch, share
        # [D] fp32 of each prompt that was run and has images; None: not asked for.
        self._images: dict[int, Tensor] | None = {} if images else None
        if bool((batch.mask[:, 1:] & ~batch.mask[:, :-1]).any()):
            remedy = "tokens in between that do not count are not supported here"
            fail("mask", "each row True up to the rollout's end", "a row with a hole", remedy)
        prompt, self._tokens, self._mask, inverse = distinct_rows(
            batch.group, batch.tokens, batch.mask
        )
        self._prompt, self._inverse = (x.numpy(force=True) for x in (prompt, inverse))
        self._lengths = self._mask.sum(-1).numpy(force=True)
        self.lengths: Integers = self._lengths[self._inverse]  # [B]
        places = (len(batch.view_pixels) + 1, len(self._prompt))
        # Of each pair: the state that predicts its first token, and the first of the others.
        self._before, self._starts = (np.full(places, -1, dtype=np.int64) for _ in range(2))
        self._calls: list[Tensor] = []
        self._size = 0

    def run(self, wanted: Flags) -> None:
        """One call of the model, for the pairs [K + 1, B] that are wanted; a later call counts.

        On several ranks a row for each completion takes a call on every variant, each of one row at
        least; a shared prompt takes one call.
        """
        run = np.zeros_like(self._before, dtype=bool)
        for variant, rollouts in enumerate(wanted & (self.lengths > 0)):
            run[variant, self._inverse[rollouts]] = True
        if ranks() > 1 and not self.share:
            run[~run.any(1), 0] = True
        elif ranks() > 1 and not run.any():
            run[0, 0] = True
        if run.any():
            (self._run_groups if self.share else self._run_rows)(run)

    def has(self, variant: int) -> Flags:
        """[B]: whether a rollout has been run on a variant of its images."""
        found: Flags = (self._before[variant] >= 0)[self._inverse]
        return found

    def tokens_by_prompt(self, wanted: Flags) -> Integers:
        """[P]: tokens of the text model that running such pairs takes, prompt by prompt."""
        prompts, width = self.batch.prompts, self.batch.prompts.input_ids.shape[1]
        sizes = np.zeros(len(prompts.images), dtype=np.int64)
        for rollouts in wanted & (self.lengths > 0):
            own = np.unique(self._inverse[rollouts])
            if self.share:
                np.add.at(sizes, self._prompt[own], self._lengths[own] - 1)
                used = np.unique(self._prompt[own])
                sizes[used] += np.array(prompts.lengths, dtype=np.int64)[used]
            else:
                np.add.at(sizes, self._prompt[own], width + self._mask.shape[1] - 1)
        return sizes

    def groups(self, run: Flags) -> list[Group]:
        """The groups [K + 1, distinct completions] as the model packs them."""
        return [
            Group(variant, prompt, tuple(members))
            for variant, own in enumerate(run)
            for prompt, members in groupby(
                np.flatnonzero(own).tolist(), key=lambda i: int(self._prompt[i])
            )
        ]

    def _features(self, groups: list[Group]) -> ImageFeatures:
        """Those of the groups' images; what sampling computed is not computed again."""
        policy, batch = self.policy, self.batch
        # old_logp is None: no update has come since.
        same = batch.old_logp is None and not torch.is_grad_enabled()
        known = batch.clean_features if same or policy.vision_is_frozen else None
        # Ranks agree about K, and whether features are known.
        needed = ranks() > 1 and (known is None or len(batch.view_pixels) > 0)
        run = (group.prompt for group in groups if group.variant or known is None)
        if needed and not any(batch.prompts.images_of(prompt) for prompt in run):
            blank = policy.blank_features(batch.prompts)
            levels = (features for level in blank.deepstack for features in level)
            self._calls.append(torch.cat([*blank.embeddings, *levels]))
            self._size += len(self._calls[-1])
        return policy.group_features(batch.prompts, batch.view_pixels, groups, clean=known)

    def _run_groups(self, run: Flags) -> None:
        policy, batch, groups = self.policy, self.batch, self.groups(run)
        # A completion without a token stands in as one of one token: that adds none to the row.
        lengths = self._mask.sum(-1).clamp(min=1)
        packed = policy.packed(batch.prompts, groups, self._tokens, lengths)
        features = self._features(groups)
        states = policy.packed_hidden(packed, features)
        starts = packed.segments.prompt_starts
        for group, start in zip(groups, starts.tolist(), strict=True):
            if not group.variant:
                self._keep_image(
                    group.prompt, states[start:][: batch.prompts.lengths[group.prompt]]
                )
        pairs = [(group.variant, i) for group in groups for i in group.rollouts]
        variants, members = np.array(pairs, dtype=np.int64).T
        self._keep(variants, members, states, packed.before, packed.starts)

    def _run_rows(self, run: Flags) -> None:
        policy, batch = self.policy, self.batch
        groups = self.groups(run)
        features, first_image = self._features(groups), 0
        for variant in np.flatnonzero(run.any(1)).tolist():
            own = [group.prompt for group in groups if group.variant == variant]
            images = sum(len(batch.prompts.images_of(prompt)) for prompt in own)
            members = np.flatnonzero(run[variant])
            rows = torch.from_numpy(members).to(batch.group.device)
            prompt, width = self._prompt[members], batch.prompts.input_ids.shape[1]
            whole = policy.row_hidden(
                batch.prompts.select(own),
                features.part(first_image, images),
                torch.from_numpy(np.searchsorted(own, prompt)).to(rows.device),
                self._tokens[rows],
                self._mask[rows],
            )
            if not variant:
                for row in np.searchsorted(prompt, own).tolist():
                    self._keep_image(int(prompt[row]), whole[row, :width])
            states = whole[:, width - 1 :]
            first_image += images
            first = np.arange(len(members)) * states.shape[1]
            variants = np.full(len(members), variant)
            self._keep(variants, members, states.flatten(0, 1), first, first + 1)

    def _keep_image(self, prompt: int, states: Tensor) -> None:
        """Of a prompt's own tokens, at the end of its padded row, the mean state of the image's."""
        if self._images is None or not self.batch.prompts.images_of(prompt):
            return
        ids = self.batch.prompts.input_ids[prompt, -len(states) :]
        self._images[prompt] = states[ids == self.policy.image_id].float().mean(0)

    def image_states(self) -> Tensor:
        """[P, D] fp32: the mean last-layer state of each prompt's image tokens, of all its images.

        0 for a prompt without images, and for one of which nothing was run on the clean images.
        """
        assert self._images is not None  # they were asked for
        states = self._calls[0] if self._calls else self.policy.head_weight
        found = states.new_zeros(len(self.batch.prompts.images), states.shape[1]).float()
        for prompt, state in self._images.items():
            found[prompt] = state
        return found

    def _keep(
        self,
        variants: Integers,
        members: Integers,
        states: Tensor,
        before: Integers,
        starts: Integers,
    ) -> None:
        self._before[variants, members] = before + self._size
        self._starts[variants, members] = starts + self._size
        self._calls.append(states)
        self._size += len(states)

    def read(self, variants: Integers, rollouts: Integers) -> Tensor:
        """States [N, D] that predict the tokens of pairs, pair after pair; each must have run."""
        own = self._inverse[rollouts]
        lengths = self._lengths[own]
        where = ranges(self._starts[variants, own] - 1, lengths)
        some = lengths > 0
        where[(np.cumsum(lengths) - lengths)[some]] = self._before[variants, own][some]
        if not self._calls:  # no rollout has a token
            return self.policy.head_weight.new_zeros(0, self.policy.head_weight.shape[1])
        if len(self._calls) > 1:
            self._calls = [torch.cat(self._calls)]
        states = self._calls[0]
        return states.index_select(0, torch.from_numpy(where).to(states.device))


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
