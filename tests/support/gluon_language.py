"""Gluon's language in numpy, for kernels that run on the multiprocessor of `multiprocessor.py`.

Numbers have the widths that they have on a GPU: a 32-bit number that overflows is a fault, and so
is an access of global memory outside its array. Layouts mean nothing: the compiler checks them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support.gluon_source import Operation, Translated
from support.multiprocessor import (
    Barrier,
    Block,
    Copy,
    Fault,
    Multiprocessor,
    Partition,
    Sum,
    merge,
)


class Memory:
    """An array in global memory, which counts how often each element is stored."""

    def __init__(self, array: np.ndarray, kind: Any = None) -> None:
        self.array, self.kind = array, kind or array.dtype
        self.size = array.size
        self.stored = np.zeros(array.size, np.int32)

    def load(self, places: np.ndarray) -> np.ndarray:
        """The elements at offsets."""
        return self.array[places]

    def store(self, places: np.ndarray, values: np.ndarray) -> None:
        """To offsets."""
        self.array[places] = values
        np.add.at(self.stored, places, 1)


class SparseMemory(Memory):
    """An array too large for this machine, of which little is stored."""

    def __init__(self, size: int, kind: Any) -> None:
        self.size, self.kind = size, kind
        self.values: dict[int, float] = {}

    def store(self, places: np.ndarray, values: np.ndarray) -> None:
        self.values |= dict(zip(places.tolist(), values.tolist(), strict=True))


class Pointer:
    """Pointers into global memory."""

    def __init__(self, memory: Memory, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.kind)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(other, np.int64))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where the mask holds, and the offsets there."""
        offset, mask = np.broadcast_arrays(self.offset, mask)
        chosen = offset[mask]
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.memory.size:
            raise Fault(f"an access at {chosen.min()} … {chosen.max()} of {self.memory.size}")
        return mask, chosen


class Descriptor:
    """A matrix that the copy engine reads in blocks, with zeros beyond its edges."""

    dtype, layout = "elements of two bytes", "swizzled"

    def __init__(self, matrix: np.ndarray, block_shape: list[int]) -> None:
        self.matrix, self.block_shape = matrix, block_shape

    def block(self, row: int, col: int) -> np.ndarray:
        """The block at (row, col)."""
        height, width = self.block_shape
        if not (0 <= row < self.matrix.shape[0] + height and 0 <= col < self.matrix.shape[1]):
            raise Fault(f"a block at {row}, {col} of a matrix {self.matrix.shape}")
        values = np.zeros(self.block_shape, np.float32)
        inside = self.matrix[row : row + height, col : col + width]
        values[: inside.shape[0], : inside.shape[1]] = inside
        return values


class Ring:
    """An allocation in shared memory, of blocks or of barriers."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def index(self, i: int) -> Any:
        """The i-th."""
        if not 0 <= i < len(self.items):
            raise Fault(f"index {i} of a ring of {len(self.items)}")
        return self.items[i]


# Operations: multiprocessor, partition, arguments.


def program_id(machine: Multiprocessor, _: Partition, axis: int) -> np.int32:
    return machine.number


def num_programs(machine: Multiprocessor, _: Partition, axis: int) -> np.int32:
    return machine.programs


def allocate_shared_memory(
    machine: Multiprocessor, _: Partition, dtype: Any, shape: list[int], layout: Any
) -> Ring:
    machine.shared += math.prod(shape) * (8 if dtype is np.int64 else 2)
    if machine.shared > 227 * 1024:
        raise Fault(f"{machine.shared} bytes of shared memory")
    if dtype is not np.int64:
        return Ring([Block(f"block {i} of {shape}", shape[1:]) for i in range(shape[0])])
    name = f"barrier {len(machine.barriers) // shape[0]}"
    barriers = [Barrier(f"{name}[{i}]") for i in range(shape[0])]
    machine.barriers += barriers
    return Ring(barriers)


def warp_specialize(
    machine: Multiprocessor, _: Partition, parts: Any, warps: list[int], registers: list[int]
) -> None:
    # 65,536 registers, in three warpgroups: a request beyond them would never be granted.
    if sum(registers) + registers[0] > 65536 // 128 // 8 * 8:
        raise Fault(f"registers for {registers} and a consumer as large as the first")
    machine.specialize(parts)


def init(_: Multiprocessor, partition: Partition, barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def fence_async_shared(machine: Multiprocessor, _: Partition) -> None:
    for barrier in machine.barriers:
        barrier.shown = barrier.shown or barrier.count > 0


def wait(_: Multiprocessor, partition: Partition, barrier: Barrier, phase: int) -> None:
    barrier.passes(partition)


def arrive(
    _: Multiprocessor, partition: Partition, barrier: Barrier, *, count: int = 1, pred: Any = True
) -> None:
    if pred:
        barrier.arrive(partition.clock, count)


def expect(_: Multiprocessor, partition: Partition, barrier: Barrier, size: int) -> None:
    barrier.arrive(partition.clock, expected=size)


def copy_block(
    machine: Multiprocessor,
    partition: Partition,
    source: Descriptor,
    place: list[int],
    barrier: Barrier,
    block: Block,
) -> None:
    if not barrier.shown:
        raise Fault(f"{barrier.name} is not shown to the copy engine by a fence")
    block.written(partition.clock)
    clock = partition.clock | {block: block.copies}
    machine.copies.append(Copy(block, source.block(*place), barrier, clock))


def warpgroup_mma(
    machine: Multiprocessor,
    partition: Partition,
    states: Block,
    weights: Block,
    tile: Any,
    *,
    is_async: bool = False,
) -> Any:
    number, reader = partition.issued + 1, partition.products_name()
    for block in (states, weights):
        block.read(partition.clock, reader, number)
    total = Sum(tile.values if isinstance(tile, Sum) else np.array(tile), number)
    partition.issued = number
    partition.products.append((total, states, weights))
    return total if is_async else warpgroup_mma_wait(machine, partition, 0, (total,))


def warpgroup_mma_wait(
    _: Multiprocessor, partition: Partition, num_outstanding: int, deps: tuple[Sum]
) -> Any:
    ended = partition.issued - num_outstanding
    while len(partition.products) > num_outstanding:
        partition.compute()
    merge(partition.clock, {partition.products_name(): ended})
    (total,) = deps
    return total if total.last > ended else total.values


def load(
    _: Multiprocessor, __: Partition, pointer: Pointer, mask: Any = True, other: Any = 0
) -> Any:
    mask, chosen = pointer.places(mask)
    found = pointer.memory.load(chosen)
    values = np.full(mask.shape, other, found.dtype)
    values[mask] = found
    return values if values.shape else values[()]


def store(_: Multiprocessor, __: Partition, pointer: Pointer, value: Any, mask: Any = True) -> None:
    mask, chosen = pointer.places(mask)
    pointer.memory.store(chosen, np.broadcast_to(value, mask.shape)[mask])


# Functions of values.


def numbers(*bounds: Any) -> Iterator[np.int32]:
    """A range of 32-bit numbers."""
    return map(np.int32, range(*map(int, bounds)))


def arange(start: int, end: int, layout: Any = None) -> np.ndarray:
    return np.arange(start, end, dtype=np.int32)


def cdiv(x: Any, y: Any) -> Any:
    return (x + y - 1) // y


def reduce(values: tuple[np.ndarray, ...], axis: int, combine: Translated) -> Any:
    """By halves, as a GPU's lanes do it."""
    while values[0].shape[axis] > 1:
        parts = [np.array_split(x, 2, axis) for x in values]
        values = combine.at_once(*(x for x, _ in parts), *(y for _, y in parts))
    return tuple(x.take(0, axis) for x in values)


def cast(x: Any, dtype: Any) -> Any:
    """To a type of numpy, or rounded to one of torch."""
    if isinstance(dtype, torch.dtype):
        return torch.from_numpy(x).to(dtype).float().numpy()
    return x.astype(dtype)


def assume(holds: Any) -> None:
    if not holds:
        raise Fault("the compiler was told what does not hold")


def static_assert(holds: bool) -> None:
    if not holds:
        raise Fault("a static assertion")


def _single(*values: Any) -> tuple[Any, ...]:
    return tuple(np.float32(x) if isinstance(x, float) else x for x in values)


GL = SimpleNamespace(
    int32=np.int32,
    int64=np.int64,
    float32=np.float32,
    program_id=Operation(program_id),
    num_programs=Operation(num_programs),
    allocate_shared_memory=Operation(allocate_shared_memory),
    warp_specialize=Operation(warp_specialize),
    load=Operation(load),
    store=Operation(store),
    static_range=range,
    arange=arange,
    cdiv=cdiv,
    minimum=np.minimum,
    maximum=np.maximum,
    max=np.max,
    sum=lambda x, axis: np.sum(x, axis, dtype=np.float32),
    reduce=reduce,
    where=lambda mask, x, y: np.where(mask, *_single(x, y)),
    exp2=np.exp2,
    fma=lambda x, y, z: (np.float64(x) * y + z).astype(np.float32),
    map_elementwise=lambda function, *args: function.at_once(*args),
    zeros=lambda shape, dtype, layout: np.zeros(shape, dtype),
    full=lambda shape, value, dtype, layout: np.full(shape, value, dtype),
    cast=cast,
    assume=assume,
    static_assert=static_assert,
    NVMMADistributedLayout=lambda **_: None,
    SliceLayout=lambda *_: None,
)

NAMES = {
    "gl": GL,
    "range": numbers,
    "mbarrier": SimpleNamespace(
        init=Operation(init),
        wait=Operation(wait),
        arrive=Operation(arrive),
        expect=Operation(expect),
        MBarrierLayout=lambda: None,
    ),
    "fence_async_shared": Operation(fence_async_shared),
    "copy_block": Operation(copy_block),
    "warpgroup_mma": Operation(warpgroup_mma),
    "warpgroup_mma_wait": Operation(warpgroup_mma_wait),
}
