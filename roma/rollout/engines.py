"""Which engine samples: the one that the configuration names."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from roma.models.qwen_vl import Policy
from roma.rollout.base import Sampler
from roma.rollout.hf import HfSampler
from roma_kernels.errors import fail

if TYPE_CHECKING:
    from roma.rollout.vllm import VllmOptions


class RolloutOptions(Protocol):
    """What is read of the configuration's section `worker.rollout`."""

    @property
    def name(self) -> str:
        """The engine, "hf" or "vllm"."""

    @property
    def vllm(self) -> "VllmOptions":
        """Options of vLLM."""


def make_sampler(
    options: RolloutOptions,
    policy: Policy,
    *,
    weights: Callable[[], Iterator[tuple[str, Tensor]]],
    version: Callable[[], int],
    synced: bool = False,
) -> Sampler:
    """The sampling engine of a run.

    Args:
        options: section `worker.rollout`.
        policy: the model.
        weights: the policy's weights under Hugging Face names, whole, adapters merged, in one order
            on all ranks; every rank calls it at the same time.
        version: changes when the weights do.
        synced: of `HfSampler`.

    Raises:
        ValueError: no such engine, or it cannot run the policy.
        ImportError: the engine is not installed.
    """
    if options.name == "hf":
        return HfSampler(policy, synced=synced)
    if options.name == "vllm":
        from roma.rollout.vllm import VllmSampler

        return VllmSampler(policy, weights=weights, version=version, options=options.vllm)
    fail("worker.rollout.name", '"hf" or "vllm"', repr(options.name), "name one of the two")
