"""Engines whose ranks hold every weight: one process, and PyTorch's DDP.

FSDP2 is built on the first: it, too, steps AdamW itself.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from roma.train.batch import Totals, UpdateBatch
from roma.train.engine.base import Engine
from roma.train.engine.state import MOMENTS
from roma.train.update import Update

T = TypeVar("T")


class Single(Engine):
    """One process."""

    def wrap(self) -> None:
        """Nothing is wrapped."""

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls it."""
        return function(*args, **kwargs)

    def clip_and_step(self) -> float:
        """Every weight takes part in every step, with a gradient of 0 if it has none."""
        for weight in self.trained.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        found = clip_grad_norm_(self.trained.values(), self.actor.max_grad_norm)
        norm = float(self.whole(found))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def whole(self, weight: Tensor) -> Tensor:
        """It is."""
        return weight.detach()

    def own(self, like: Tensor, whole: Tensor) -> Tensor:
        """What this rank holds of a tensor that is laid out as another one."""
        return whole.to(like.device)

    @torch.no_grad()
    def put(self, weight: nn.Parameter, whole: Tensor) -> None:
        """A copy."""
        weight.copy_(self.own(weight, whole))

    def moment(self, weight: nn.Parameter, name: str) -> Tensor | None:
        """As the optimizer has it."""
        found: Tensor | None = self.optimizer.state.get(weight, {}).get(name)
        return None if found is None else self.whole(found)

    def put_moments(self, weight: nn.Parameter, moments: dict[str, Tensor], steps: int) -> None:
        """Copies."""
        state = {name: self.own(weight, moments[name]).clone() for name in MOMENTS}
        self.optimizer.state[weight] = {"step": torch.tensor(float(steps)), **state}


class Ddp(Single):
    """`DistributedDataParallel`: every rank has everything, gradients are averaged."""

    def wrap(self) -> None:
        """Only the forward of the loss goes through it: nothing else has a weight's gradient."""
        cuda = self.policy.device.type == "cuda"
        self.wrapped = nn.parallel.DistributedDataParallel(
            self.door,
            device_ids=[self.policy.device.index] if cuda else None,
            gradient_as_bucket_view=True,
        )

    def forward_loss(self, part: UpdateBatch, totals: Totals) -> Update:
        """Through the wrapper."""
        found: Update = self.wrapped(self.policy_loss, part, totals)
        return found

    def last(self, is_last: bool) -> None:
        """Gradients are averaged in the last backward."""
        self._without.close()
        if not is_last:
            self._without.enter_context(self.wrapped.no_sync())

    @contextmanager
    def reduced_once(self) -> Iterator[None]:
        """Leaves no `no_sync` open, whatever happens."""
        with ExitStack() as self._without:
            yield
