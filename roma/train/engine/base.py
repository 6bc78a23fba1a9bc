"""What the engines have in common: the door to the weights, the schedule, what a resumed run needs.

An engine owns the weights while they learn. Whatever reads one is called through `Engine.call`, by
every rank, equally often: where weights are sharded they are whole inside of it alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from roma.models import export
from roma.train import ranks
from roma.train.batch import Totals, UpdateBatch
from roma.train.config.sections import ActorConfig
from roma.train.engine import state
from roma.train.parts import Parts
from roma.train.update import PolicyLoss, Update

T = TypeVar("T")
Rate = Callable[[int], float]


class Door(nn.Module):
    """The module that wrappers wrap: inside of its forward every weight can be read."""

    def __init__(self, policy_loss: PolicyLoss) -> None:
        """Holds the policy."""
        super().__init__()
        self.policy_loss = policy_loss

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls a function that reads weights."""
        return function(*args, **kwargs)


class Engine(ABC):
    """Weights, gradients and optimizer (AdamW) of a run.

    Args:
        policy_loss: the policy and its loss, whole; where weights are to be sharded, on the CPU.
        device: of this process.
        actor: options of the optimizer.
        dtype: of matrix products, "float32" or "bfloat16"; weights and their sums stay fp32.
        rate: the learning rate of an optimizer step, as a share of the peak.
    """

    sharded: ClassVar[bool] = False
    """Whether a rank holds a part of the weights alone."""

    def __init__(
        self,
        policy_loss: PolicyLoss,
        device: torch.device,
        actor: ActorConfig,
        dtype: str,
        rate: Rate,
    ) -> None:
        """Wraps the policy."""
        self.policy_loss, self.device, self.actor = policy_loss, device, actor
        self.dtype, self.rate = dtype, rate
        self.policy = policy_loss.policy
        self.version = 0
        """Optimizer steps done; a sampler with weights of its own takes new ones by it."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.door = Door(policy_loss)
        self.wrap()
        named = list(self.policy.model.named_parameters())
        # A module of FSDP2 shows other parameters now and then: an optimizer keeps these.
        self.parameters: dict[str, nn.Parameter] = dict(named)
        self.trained = {name: weight for name, weight in named if weight.requires_grad}
        self.optimizer = self.make_optimizer()

    @abstractmethod
    def wrap(self) -> None:
        """Puts the wrapper around `self.door`; weights may be sharded afterwards."""

    def make_optimizer(self) -> Optimizer:
        """Over the weights that are trained, as they are after `wrap`."""
        actor = self.actor
        return AdamW(
            self.trained.values(), lr=actor.lr, betas=actor.betas, weight_decay=actor.weight_decay
        )

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """A function of the policy; every rank calls the same, and the model equally often."""
        with self.policy.autocast(self.dtype):
            return self.forward(function, *args, **kwargs)

    @abstractmethod
    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(…)` where weights are whole."""

    def learn(
        self, parts: Parts | Sequence[tuple[Tensor, UpdateBatch]], totals: Totals
    ) -> Iterator[tuple[Tensor, Update]]:
        """Gradients of an optimizer step: one micro-batch after the other.

        They are reduced once where each rank holds them whole, and with each micro-batch where they
        are sharded: to keep them whole until the last would cost the memory that sharding saves.

        Gradients are averaged over the ranks, so that the loss is multiplied by their number. The
        caller takes all that comes.

        Args:
            parts: of this rank, as many on each.
            totals: of all ranks.

        Yields:
            What was given with a micro-batch, and its update.
        """
        with self.reduced_once():
            for number, (rows, part) in enumerate(parts, 1):
                self.last(number == len(parts))
                with self.policy.autocast(self.dtype):
                    out = self.forward_loss(part, totals)
                self.backward(ranks.ranks() * out.loss)
                yield rows, out

    def forward_loss(self, part: UpdateBatch, totals: Totals) -> Update:
        """The loss, through whatever sees the backward pass."""
        return self.forward(self.policy_loss, part, totals)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        loss.backward()

    def reduced_once(self) -> AbstractContextManager[Any]:
        """Around all backward passes of an optimizer step."""
        return nullcontext()

    def last(self, is_last: bool) -> None:
        """Before each forward pass: whether its backward is the step's last."""
        del is_last  # nothing is to be done where nothing is reduced

    def step(self) -> float:
        """The optimizer's step; gives the gradients' L2 norm over all weights, before clipping.

        One whose norm is not finite is left out, and not counted.
        """
        self.lr = self.actor.lr * self.rate(self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        norm = self.clip_and_step()
        self.version += math.isfinite(norm)
        return norm

    @abstractmethod
    def clip_and_step(self) -> float:
        """Clips, steps if the norm is finite, forgets the gradients; gives the norm."""

    @abstractmethod
    def whole(self, weight: Tensor) -> Tensor:
        """A weight in whole; every rank calls."""

    @abstractmethod
    def put(self, weight: nn.Parameter, whole: Tensor) -> None:
        """Sets a weight from its whole; every rank calls."""

    @abstractmethod
    def moment(self, weight: nn.Parameter, name: str) -> Tensor | None:
        """A moment of the optimizer in whole, None before the first step; every rank calls."""

    @abstractmethod
    def put_moments(self, weight: nn.Parameter, moments: dict[str, Tensor], steps: int) -> None:
        """Sets the optimizer's state of a weight; every rank calls."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and whole tensors, adapters merged; every rank takes all of them."""
        return export.merged_weights(self.policy, whole=self.whole)

    def save(self, folder: Path) -> None:
        """Writes what a resumed run needs beside the export; every rank calls."""
        state.save(self, folder)

    def load(self, folder: Path) -> None:
        """Reads what `save` of any engine on any number of ranks wrote; every rank calls.

        Weights that are not adapters' are those of the export: `checkpoint.restore` puts them.
        """
        state.load(self, folder)

    def export(self, folder: Path) -> None:
        """The policy in Hugging Face form, fp32, written by the first rank; every rank calls."""
        export.save(self.policy, folder, whole=self.whole, write=ranks.rank() == 0)
