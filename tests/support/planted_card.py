"""Imported by a worker: a GPU as far as torch's own functions show one; the CPU computes."""

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench import nvidia

FREE, TAKEN = 70 * 2**20, 7 * 2**20  # bytes
asked = 0


class Redirected(TorchFunctionMode):
    """What is to be made on the GPU is made on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = dict(named or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        return function(*arguments, **named)


class Event:
    """A moment; `enable_timing` as torch has it."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


def stats() -> dict[str, int]:
    """The driver is asked whenever somebody looks, so that every call is timed twice."""
    global asked
    asked += 1
    return {"num_device_alloc": asked}


generator = torch.Generator


class Generator:
    """The CPU's; a class, because torch's annotations need one."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:  # type: ignore[misc]
        return generator("cpu")


torch.Generator = Generator  # type: ignore[assignment,misc]
fakes: dict[str, Any] = {
    "Event": Event,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "mem_get_info": lambda: (FREE, 80 * FREE),
    "memory_allocated": lambda: 100,
    "reset_peak_memory_stats": lambda: None,
    "max_memory_allocated": lambda: 100 + TAKEN,
    "memory_stats": stats,
    "get_device_properties": lambda device: SimpleNamespace(
        name="a card", multi_processor_count=132, L2_cache_size=50 * 2**20
    ),
}
for name, fake in fakes.items():
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, fake)
answers = iter(range(40, 99))
nvidia.state = lambda: {"driver": "580", "temperature_c": str(next(answers))}
Redirected().__enter__()
