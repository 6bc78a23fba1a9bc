"""A Gluon kernel that a launcher can launch: it runs on simulated multiprocessors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from support.gluon_language import NAMES, Descriptor, Memory, Pointer
from support.gluon_source import Translator
from support.multiprocessor import Multiprocessor
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class SimulatedKernel:
    """Stands for a kernel in `kernel[grid](…)`.

    Args:
        kernel: whose source runs.
        edits: changes of the source, as `Translator` has them.
        order: as `Multiprocessor` has it.
        seed: of chance.
        numbers: the programs to run; None: all of the grid.
        instead: memories that stand for arguments, by name.
    """

    def __init__(
        self,
        kernel: GluonJITFunction,
        *edits: tuple[str, str],
        order: tuple[str, ...] = (),
        seed: int = 0,
        numbers: list[int] | None = None,
        instead: Mapping[str, Memory] | None = None,
    ) -> None:
        self._kernel = Translator(NAMES, *edits).kernel(kernel)
        self._order, self._seed, self._numbers = order, seed, numbers
        self._instead = instead or {}
        self.memories: dict[str, Memory] = {}
        """What the last launch's pointers point to."""

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4, "a consumer is a warpgroup"
            names = self._kernel.names
            tensors = dict(zip(names, args, strict=False))
            given = {name: self._argument(name, x) for name, x in tensors.items()}
            with np.errstate(over="raise", under="ignore"):
                for number in range(grid[0]) if self._numbers is None else self._numbers:
                    machine = Multiprocessor(number, grid[0], self._order, self._seed)
                    machine.run(self._kernel, given | constants)
            for name, memory in self.memories.items():
                if name not in self._instead and memory.stored.any():
                    _flat(tensors[name]).copy_(torch.from_numpy(memory.array))

        return launch

    def _argument(self, name: str, value: Any) -> Any:
        value = self._instead.get(name, value)
        if isinstance(value, TensorDescriptor):
            return Descriptor(_numpy(value.base), value.block_shape)
        if isinstance(value, Tensor):
            narrow = value.dtype in (torch.bfloat16, torch.float16)
            value = Memory(_numpy(_flat(value)), value.dtype if narrow else None)
        if isinstance(value, Memory):
            self.memories[name] = value
            return Pointer(value)
        if isinstance(value, int):
            return np.int32(value)
        return np.float32(value) if isinstance(value, float) else value


def _flat(tensor: Tensor) -> Tensor:
    """From its first element to the end of its storage."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((size,), (1,))


def _numpy(tensor: Tensor) -> np.ndarray:
    """Of float32 for types that numpy lacks; expanded dimensions stay so."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float() if tensor.stride(0) else tensor[:1].float().expand(tensor.shape)
    return tensor.numpy()
