"""Imported by a worker: ours has the fault that a variant's vocabulary stands for."""

from support.planted import FAULTS, provider
from torch import Tensor

from bench.providers import OURS, PROVIDERS

FIRST = 500  # the vocabulary of the first fault; the next one has an entry more
made = [make() for make, _ in FAULTS.values()]


def ours(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return made[len(weight) - FIRST](states, weight, tokens)


PROVIDERS[:] = [provider(OURS, ours), *PROVIDERS[1:]]
