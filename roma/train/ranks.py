"""The processes that learn together: who they are, and what they tell one another.

Started bare, a run is one process. Started by torchrun, `accelerate launch` or `deepspeed`, it is
one of `WORLD_SIZE`, and each has a share of every mini-batch's prompts.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.errors import fail

T = TypeVar("T")


def take_card() -> None:
    """Makes this process's card the current one, before anything is put on the first."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


@contextmanager
def started(device: torch.device, *, alone: bool = False) -> Iterator[torch.device]:
    """Joins the other processes, if a launcher has started some, and leaves them at the end.

    Args:
        device: "cuda" becomes the current card.
        alone: make a group of one, too, for an engine that needs one.

    Yields:
        The device of this process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    if dist.is_initialized() or (world == 1 and not alone):
        yield device
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world > 1:
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        store = dist.HashStore()  # type: ignore[attr-defined]  # it is exported
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks() -> int:
    """How many processes learn together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first one writes and speaks."""
    return dist.get_rank() if ranks() > 1 else 0


def share(count: int, name: str) -> int:
    """How many of `count` prompts are this rank's.

    Raises:
        ValueError: the ranks cannot have equally many; `name` is the key that says how many.
    """
    if count % ranks():
        remedy = "every rank takes equally many prompts of an optimizer step"
        fail(name, f"a multiple of the {ranks()} ranks", str(count), remedy)
    return count // ranks()


def told(value: T) -> list[T]:
    """What each rank says, in the order of the ranks."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def gathered(values: Tensor) -> Tensor:
    """Tensors [n, …] of all ranks, end to end, on the device of this one's."""
    if ranks() == 1:
        return values
    return torch.cat([part.to(values.device) for part in told(values.cpu())])


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers under the same names, added over the ranks."""
    found: dict[str, float] = {}
    for part in told(dict(values)):
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


def most(count: int) -> int:
    """The largest number that a rank says."""
    return max(told(count))
