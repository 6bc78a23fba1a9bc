"""What advantages are made of, and of what make them."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from roma.advantages.base import OptionalInput
from roma.data import Example
from roma.models.prompts import PromptBatch
from roma.rollout.base import Rollouts
from roma.train.scoring import Read, Scores
from roma.train.views import Views

Metrics = dict[str, float]


@dataclass(frozen=True)
class Sampled:
    """P prompts and their B = P·G rewarded rollouts, before anything is learnt of them."""

    step: int
    examples: list[Example]
    prompts: PromptBatch  # as the policy is scored on: those that were sampled on, or clean
    rollouts: Rollouts
    group: Tensor  # [B] int64, the prompt of each rollout
    rewards: Mapping[str, Tensor]  # each [B]
    masked: "Future[Views] | None" = None  # a view with black patches, if it was asked for

    @property
    def failed(self) -> Tensor:
        """[B] bool: the rollout has no reward."""
        return self.rewards["failed"] > 0


class Base(Protocol):
    """Makes advantages of rewards."""

    @property
    def needs(self) -> frozenset[OptionalInput]:
        """What it reads of the rollouts' scores."""

    def __call__(self, sampled: Sampled, scores: Scores | None, /) -> tuple[Tensor, Metrics]:
        """Advantages [B] or [B, T], 0 where a reward failed, and metrics; every rank calls."""


class Weights(Protocol):
    """Weighs the tokens of a rollout, whatever its advantage."""

    @property
    def needs(self) -> frozenset[OptionalInput]:
        """What it reads of the rollouts' scores."""

    @property
    def wants_masked(self) -> bool:
        """Whether `Sampled.masked` is to be there."""

    def reader(self, sampled: Sampled, /) -> Read | None:
        """What it makes of hidden states, as `Scores.read`; None: it reads none."""

    def __call__(self, sampled: Sampled, scores: Scores, /) -> tuple[Tensor, Metrics]:
        """Positive factors [B, T], and metrics; every rank calls."""
