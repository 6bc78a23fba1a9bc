"""The update on two ranks: how batches are cut between them, and the engines that run them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.small_run import config
from torch import Tensor, nn

from roma.models.qwen_vl import Policy
from roma.train.batch import Totals, UpdateBatch
from roma.train.engine import make_engine
from roma.train.engine.zero import Zero
from roma.train.update import PolicyLoss

Gradients = dict[str, Tensor]  # of every trained weight of a policy, whole


@dataclass(frozen=True)
class Cut:
    """The prompts of each rank, micro-batch by micro-batch, and what their rollouts are worth."""

    ranks: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]
    right: tuple[int, ...]  # prompts with right answers; every third one is wrong
    level: tuple[int, ...] = ()  # prompts whose rollouts have no advantage
    empty: tuple[int, ...] = ()  # prompts whose rollouts have no token
    sampled: bool = False  # by these very weights: no old log-probs, but features are known

    @property
    def prompts(self) -> list[int]:
        """Those of both ranks."""
        return sorted(p for parts in self.ranks for part in parts for p in part)


CUTS = {  # prompts 3 and 5 have no image
    "right_on_one": Cut((((0, 1),), ((2, 4),)), right=(0, 1), level=(1,)),
    "nothing_on_one": Cut((((2, 0),), ((1,),)), right=(0,), level=(1,)),
    "text_on_one": Cut((((0, 1),), ((3,),)), right=(0, 1, 3), sampled=True),
    "micro_batches": Cut(
        (((0,), (1,), (3,)), ((5,), (2,), (4,))), right=(0, 2, 3), level=(1, 3, 5), empty=(5,)
    ),
}


def batch_of(policy: Policy, cut: Cut, views: int) -> UpdateBatch:
    """The prompts of a cut, each with 3 rollouts, two of them equal, on up to 2 views."""
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int):
        return torch.randint(256, (height, width, 3), generator=generator).to(torch.uint8).numpy()

    problems = ["<image> sum ?", "left <image> right <image> larger ?", "so <image> larger sum ?"]
    problems += ["larger sum ?", "<image> left ?", "right ?"]
    images = [[image(32, 64)], [image(32, 32), image(64, 48)], [image(61, 70)]]
    images += [[], [image(32, 32)], []]
    prompts = policy.encode_prompts(problems, images)
    group = torch.arange(len(problems)).repeat_interleave(3)
    shape = (len(group), 5)
    tokens = torch.randint(9, 20, shape, generator=generator)
    mask = torch.arange(5) < torch.randint(1, 6, (len(group), 1), generator=generator)
    tokens[1], mask[1] = tokens[0], mask[0]
    level, right, empty = (
        torch.isin(group, torch.tensor(x)) for x in (cut.level, cut.right, cut.empty)
    )
    aux_view = torch.randint(2, (len(group),), generator=generator)
    advantages = torch.randn(len(group), generator=generator)
    with torch.no_grad():
        features = policy.image_features(prompts.pixel_values, prompts.grids)
    changes: tuple[Callable[[Any], Any], ...] = (lambda x: x // 2, lambda x: 255 - x)
    return UpdateBatch(
        prompts=prompts,
        view_pixels=[
            policy.view_pixels(prompts, [[change(x) for x in own] for own in prompts.images])
            for change in changes[:views]
        ],
        group=group,
        tokens=tokens,
        mask=mask & ~empty[:, None],
        advantages=advantages.masked_fill(level, 0.0),
        correct=right & (torch.arange(len(group)) % 3 != 1),
        aux_view=aux_view if views else None,
        old_logp=None if cut.sampled else torch.full(shape, -3.7),
        clean_features=features if cut.sampled else None,
    ).select(cut.prompts)


def parts_of(batch: UpdateBatch, cut: Cut, rank: int) -> list[UpdateBatch]:
    """The micro-batches of a rank."""
    return [batch.select([cut.prompts.index(p) for p in part]) for part in cut.ranks[rank]]


def one_process(loss: PolicyLoss, batch: UpdateBatch) -> Gradients:
    """What the ranks are held to: all of the batch at once, before there is a group."""
    loss.zero_grad()
    loss(batch, batch.totals()).loss.backward()
    return {name: weight.grad.clone() for name, weight in _trained(loss)}


class Tried:
    """An engine of the trainer, and the gradients that it holds before a step.

    Args:
        name: of the engine.
        loss: the policy and its loss, whole.
    """

    def __init__(self, name: str, loss: PolicyLoss) -> None:
        chosen = config(Path("nowhere"), f"trainer.engine={name}")
        if name == "zero3":  # every weight is sharded, however small
            options = Path(tempfile.mkdtemp()) / "deepspeed.json"
            zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
            options.write_text(json.dumps(zero))
            chosen = config(
                Path("nowhere"), "trainer.engine=zero3", f"trainer.deepspeed_config={options}"
            )
        # At a rate of 0 a step forgets the gradients, no more.
        self.engine = make_engine(chosen, loss, torch.device("cpu"), lambda _: 0.0)
        self.loss = loss
        self._backward = self.engine.backward

    def gradients(
        self, parts: Sequence[UpdateBatch], totals: Totals, *, factor: float = 1.0
    ) -> Gradients:
        """From a rank's micro-batches, reduced once, in the last one's backward.

        Args:
            parts: as many on each rank.
            totals: of all ranks.
            factor: of the loss, beside the engine's own.
        """
        self.engine.backward = lambda loss: self._backward(factor * loss)
        for _ in self.engine.learn([(part.group, part) for part in parts], totals):
            pass
        found = {name: self._whole(weight) for name, weight in self.engine.trained.items()}
        self.engine.step()
        return found

    def _whole(self, weight: nn.Parameter) -> Tensor:
        if isinstance(self.engine, Zero):
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(weight)
        return self.engine.whole(weight.grad).clone()

    def score(self, batch: UpdateBatch) -> Tensor:
        """Log-probs [B, T]."""
        return self.engine.call(self.loss.score, batch).logp


def _trained(loss: PolicyLoss) -> list[tuple[str, nn.Parameter]]:
    return [
        (n, weight) for n, weight in loss.policy.model.named_parameters() if weight.requires_grad
    ]
