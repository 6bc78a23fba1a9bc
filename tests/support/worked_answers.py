"""A sampler of worked answers, `<think> left 3 so 4 </think>`, by prompt and call alone."""

from __future__ import annotations

from typing import Any

import torch

from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rollout.base import Rollouts

TAGS = (
    'algorithm.srpo.perception_tag=["<think>", "so"]',
    'algorithm.srpo.reasoning_tag=["so", "</think>"]',
)
"""What is seen stands between <think> and so, what is concluded behind."""
FORMS = (
    "<think> left {} so {} </think> {}",  # perception 2, reasoning 2
    "<think> left {} right {} so {} </think>",  # perception 4, reasoning 1
    "left {} so {} </think>",  # not opened
    "<think> so so {} {} </think>",  # twice
)
PERCEPTION = (2, 4, 0, 0)
"""Tokens of it in each form, from the second on."""


class Worked:
    """Answers in the forms above, in turn.

    Args:
        policy: knows the words.
        first: form of the first answer; None: every one is of the last two, which have no roles.
    """

    def __init__(self, policy: Policy, first: int | None = 0) -> None:
        self.encode, self.first, self.calls = policy.processor.encode, first, 0

    def sample(self, prompts: PromptBatch, *, group_size: int, **_: Any) -> Rollouts:
        """As `Sampler` has it, but of no policy."""
        self.calls += 1
        rows = []
        for ids, own in zip(prompts.input_ids, prompts.lengths, strict=True):
            seed = hash((self.calls, *ids[-own:].tolist())) % 2**31
            generator = torch.Generator().manual_seed(seed)
            for _ in range(group_size):
                form, a, b, c = torch.randint(19, (4,), generator=generator).tolist()
                form = 2 + form % 2 if self.first is None else (form + self.first) % 4
                rows.append(self.encode(FORMS[form].format(a, b, c)))
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        return Rollouts(tokens, mask, mask[:, 0])
