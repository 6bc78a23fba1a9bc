"""A multiprocessor of sm_90, as far as a schedule of copies, barriers and products can go wrong.

A program's partitions run in any order, one operation at a time. Copies land and products are
computed at any moment between their issue and the wait that forces them: the scheduler picks the
moment. Values are real, so what a product read is what was there.

Independent of the order tried, races are found by vector clocks. A clock counts, for each agent
(a partition, the copies into a block, the products of a partition), what is known to have happened.
Barriers pass clocks on. A copy may overwrite a block only if every product that read it is known to
have ended; a product may read a block only if its copy is known to have landed.

Not modelled: the four warps of a partition are one, and so are a block's bytes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.gluon_source import Operation, Steps, Translated

Clock = dict[Hashable, int]


class Fault(Exception):
    """What is wrong with a schedule."""


def merge(into: Clock, other: Clock) -> None:
    """What either knows."""
    for agent, count in other.items():
        if count > into.get(agent, 0):
            into[agent] = count


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0  # not initialised
        self.shown = False  # to the asynchronous proxy
        self.pending = self.bytes = self.phase = 0
        self.gathering: Clock = {}
        self.passed: Clock = {}
        self.seen: dict[str, int] = {}
        """The phase at which each partition passed last."""

    def arrive(self, clock: Clock, count: int = 1, expected: int = 0) -> None:
        """`expected` bytes are to come, then `count` arrivals have."""
        if not self.count:
            raise Fault(f"{self.name} is not initialised")
        if count > self.pending:
            raise Fault(f"{self.name}: an arrival too many in phase {self.phase}")
        self.pending -= count
        self.bytes += expected
        self._gather(clock)

    def landed(self, clock: Clock, size: int) -> None:
        """`size` bytes have come."""
        self.bytes -= size
        self._gather(clock)

    def _gather(self, clock: Clock) -> None:
        merge(self.gathering, clock)
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            merge(self.passed, self.gathering)
            self.gathering = {}

    def open(self, parity: int) -> bool:
        """Whether a wait for a phase of this parity passes."""
        return self.phase % 2 != parity

    def passes(self, partition: Partition) -> None:
        """A partition has waited: it knows what those knew who arrived."""
        before = self.seen.get(partition.name)
        if before is not None and self.phase != before + 1:
            raise Fault(
                f"{partition.name} passes {self.name} in phase {self.phase}, after phase {before}"
            )
        self.seen[partition.name] = self.phase
        merge(partition.clock, self.passed)


class Block:
    """One block of a ring in shared memory."""

    def __init__(self, name: str, shape: list[int]) -> None:
        self.name = name
        self.values = np.full(shape, np.nan, np.float32)
        self.copies = 0
        self.readers: Clock = {}

    @property
    def nbytes(self) -> int:
        """Of elements of two bytes."""
        return self.values.size * 2

    def permute(self, order: tuple[int, int]) -> Block:
        """Transposed: products take the weights so, and no other way."""
        assert order == (1, 0)
        return self

    def written(self, clock: Clock) -> None:
        """A copy is issued by someone who knows `clock`."""
        if clock.get(self, 0) < self.copies:
            raise Fault(f"{self.name}: a copy while another may be in flight")
        for reader, product in self.readers.items():
            if clock.get(reader, 0) < product:
                raise Fault(f"{self.name}: overwritten while a product of {reader} may read it")
        self.readers.clear()
        self.copies += 1

    def read(self, clock: Clock, reader: Hashable, product: int) -> None:
        """A product is issued by someone who knows `clock`."""
        if not self.copies:
            raise Fault(f"{self.name}: read, but never filled")
        if clock.get(self, 0) < self.copies:
            raise Fault(f"{self.name}: read before its copy is known to have landed")
        self.readers[reader] = product


class Sum:
    """An accumulator that products may still add to."""

    def __init__(self, values: np.ndarray, last: int) -> None:
        self.values, self.last = values, last

    def _unfinished(self, *_: Any) -> Any:
        raise Fault("a sum is used while products may still add to it")

    __add__ = __mul__ = __sub__ = __neg__ = __getitem__ = __array__ = _unfinished
    __radd__ = __rmul__ = __rsub__ = _unfinished


@dataclass
class Copy:
    """A block on its way into shared memory."""

    block: Block
    values: np.ndarray
    barrier: Barrier
    clock: Clock

    def land(self) -> None:
        """Now."""
        self.block.values[:] = self.values
        self.barrier.landed(self.clock, self.block.nbytes)


@dataclass
class Partition:
    """A role of a program, and where it is."""

    name: str
    steps: Steps
    clock: Clock = field(default_factory=dict)
    todo: tuple[Operation, tuple[Any, ...], dict[str, Any]] | None = None
    products: deque[tuple[Sum, Block, Block]] = field(default_factory=deque)
    """Issued, and not yet computed."""
    issued: int = 0
    done: bool = False

    def advance(self, result: Any) -> None:
        """Runs to the next operation."""
        try:
            self.todo = self.steps.send(result)
        except StopIteration:
            self.todo, self.done = None, True

    def compute(self) -> None:
        """The oldest product that is under way, from what is in shared memory now."""
        total, states, weights = self.products.popleft()
        total.values += states.values @ weights.values.T

    def products_name(self) -> str:
        """Of its products as an agent."""
        return f"{self.name}'s products"


class Multiprocessor:
    """Runs one program.

    Args:
        number: the program's.
        programs: how many there are.
        order: what goes first among the names of partitions, "copies" and "products"; the rest, and
            everything without an order, by chance.
        seed: of chance.
    """

    def __init__(
        self, number: int, programs: int, order: tuple[str, ...] = (), seed: int = 0
    ) -> None:
        self.number, self.programs = np.int32(number), np.int32(programs)
        self._order, self._random = order, random.Random(seed)
        self.shared = 0  # bytes
        self.barriers: list[Barrier] = []
        self.copies: list[Copy] = []
        self._partitions = [Partition("kernel", iter(()))]  # type: ignore[arg-type]

    def run(self, kernel: Translated, arguments: dict[str, Any]) -> None:
        """To its end."""
        whole = self._partitions[0]
        whole.steps = kernel.steps(**arguments)
        whole.advance(None)
        while not all(partition.done for partition in self._partitions):
            self._go(self._choice())
        self._check_end()

    def specialize(self, parts: list[tuple[Translated, tuple[Any, ...]]]) -> None:
        """Starts the partitions; they know what the kernel did before."""
        whole = self._partitions[0]
        names = [function.names[0] == "half" for function, _ in parts]
        for i, (function, args) in enumerate(parts):
            name = f"consumer {i}" if names[i] else "producer"
            partition = Partition(name, function.steps(*args), dict(whole.clock))
            partition.advance(None)
            self._partitions.append(partition)

    def _choice(self) -> Partition | Copy | str:
        """What happens next: an operation of a partition, a copy's landing, a product."""
        able: list[tuple[str, Any]] = [
            (p.name, p) for p in self._partitions if p.todo is not None and self._passes(p)
        ]
        able += [("copies", copy) for copy in self.copies]
        able += [("products", p.name) for p in self._partitions if p.products]
        if not able:
            waiting = [
                f"{p.name} for {p.todo[1][0].name}" for p in self._partitions if p.todo is not None
            ]
            raise Fault(f"deadlock: {', '.join(waiting)}")
        for name in self._order:
            first = [what for who, what in able if who == name]
            if first:
                return self._random.choice(first)
        return self._random.choice(able)[1]

    @staticmethod
    def _passes(partition: Partition) -> bool:
        assert partition.todo is not None
        operation, args, kwargs = partition.todo
        return operation.name != "wait" or args[0].open(*args[1:], **kwargs)

    def _go(self, what: Partition | Copy | str) -> None:
        if isinstance(what, Copy):
            self.copies.remove(what)
            what.land()
        elif isinstance(what, str):
            next(p for p in self._partitions if p.name == what).compute()
        else:
            assert what.todo is not None
            operation, args, kwargs = what.todo
            what.advance(operation.do(self, what, *args, **kwargs))

    def _check_end(self) -> None:
        if self.copies:
            raise Fault(f"the program ends with {len(self.copies)} copies in flight")
        for partition in self._partitions:
            if partition.products:
                raise Fault(f"{partition.name} ends with a product under way")
        for barrier in self.barriers:
            if barrier.pending != barrier.count or barrier.bytes:
                raise Fault(f"{barrier.name} is left within phase {barrier.phase}")
