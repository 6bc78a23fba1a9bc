"""What launches: the calls of a user on a chip that is not there, taken down instead of run.

The launchers run as they are, on small tensors of the CPU. Triton binds and specialises their
arguments by its own rules for the chip and would then compile; its `jit_cache_hook` takes down what
and says that nothing need be done. So a build has the types, divisibilities, constants and options
of a real launch, and nothing is restated by hand.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from roma_kernels.linear_logprob.gluon.launch import BLOCK_R, BLOCK_V
from roma_kernels.linear_logprob.triton import tuning


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton compiles it for one launch."""

    module: str
    name: str
    specialization: str
    """Types, divisibilities, constants and options, as `JITFunction.preload` reads them."""

    @cached_property
    def parts(self) -> dict[str, Any]:
        """The specialization, decoded."""
        return json.loads(self.specialization)

    @property
    def types(self) -> dict[str, str]:
        """Triton's type of each argument."""
        return self.parts["signature"]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Arguments that are fixed in the compiled kernel; a None and an integer 1 are too."""
        return self._by_name("constant")

    @cached_property
    def multiples(self) -> frozenset[str]:
        """Arguments known to be multiples of 16: addresses, strides and sizes."""
        attributes = self._by_name("attrs")
        return frozenset(k for k, v in attributes.items() if ["tt.divisibility", 16] in v)

    def _by_name(self, kind: str) -> dict[str, Any]:
        names, keys = list(self.types), self.parts[f"{kind}_keys"]
        return {names[key[0]]: x for key, x in zip(keys, self.parts[f"{kind}_vals"], strict=True)}

    @property
    def is_product(self) -> bool:
        """Whether it multiplies hidden states with a head, on matrix units: not in fp32."""
        return {"hidden", "weight"} <= self.types.keys() and self.constants.get("DTYPE") != "fp32"

    @property
    def label(self) -> str:
        """The kernel's name as documents have it."""
        return self.name.strip("_").removesuffix("_kernel")

    @property
    def tile(self) -> str:
        """Rows × columns × depth of a product's tile."""
        blocks = {"BLOCK_R": BLOCK_R, "BLOCK_V": BLOCK_V} | self.constants  # Gluon's are fixed
        return " × ".join(str(blocks[name]) for name in ("BLOCK_R", "BLOCK_V", "BLOCK_D"))

    @property
    def schedule(self) -> str:
        """Warps and stages of the pipeline."""
        options = self.parts["options"]
        return f"{options['num_warps']}, {self.constants.get('STAGES', options['num_stages'])}"

    @property
    def variant(self) -> str:
        """What tells a launch from others of its kernel and tile."""
        given = [
            f"{name} {kind}" + ("/16" if name in self.multiples else "")
            for name, kind in self.types.items()
            if kind != "constexpr" and kind != "fp32"
        ]
        fixed = [f"{k}={x}" for k, x in self.constants.items() if not k.startswith("BLOCK")]
        return ", ".join([*given, *fixed])

    def compiled(self, target: GPUTarget) -> Any:
        """Triton's compiled kernel for a target."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        with standing_in(target):
            return kernel.preload(self.specialization)


class _Driver:
    """Where Triton asks a GPU's driver for the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # kernels keep what they compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def standing_in(target: GPUTarget) -> Iterator[None]:
    """Triton takes `target` for the device of this machine."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


def recorded(chip: str, target: GPUTarget, calls: Iterator[Callable[[], None]]) -> list[Launch]:
    """What the calls launch on a chip, each launch once. They may use back end "triton" on CPUs."""
    found: dict[Launch, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Launch(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # nothing is compiled, so nothing is launched

    with (
        standing_in(target),
        tuning.override(f"chip={chip}"),
        mock.patch("roma_kernels.linear_logprob.head.resolve", _triton),
        mock.patch("roma_kernels.roma_loss.api.resolve", _triton),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(triton.JITFunction, "__getitem__", _filling),
    ):
        for call in calls:
            call()
    return list(found)


def _triton(*args: Any, **kwargs: Any) -> str:
    return "triton"


_launcher = triton.JITFunction.__getitem__


def _filling(kernel: Any, grid: Any) -> Callable[..., None]:
    """A launcher that leaves ones in the first output, so that what follows has rows to work on."""

    def launch(*args: Any, **kwargs: Any) -> None:
        _launcher(kernel, grid)(*args, **kwargs)
        if isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            args[0].fill_(1)

    return launch
