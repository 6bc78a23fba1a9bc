"""Times: providers interleaved, each round in another order, cold caches, medians and intervals.

A round times every candidate once, so that other load on the machine falls on all alike. A ratio is
taken within a round. Its interval is a bootstrap over rounds, widened by how much one run differs
from the next (`DRIFT`): by the addresses of a process's memory, and by load that lasts minutes.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

# Two runs of one commit on a shared machine of 2 cores: 5 of 99 ratios had bootstrap intervals that
# did not meet; widened by 10 %, all met. The GPU's figure is assumed, not measured.
DRIFT = {"cpu": 1.10, "cuda": 1.02}

FLUSH = 256 * 2**20  # bytes written between timings: more than any L2 or last-level cache

T = TypeVar("T")
Check = Callable[[], None]
"""Raises Wrong if what a call made is wrong."""
Run = Callable[[], Check | None]
"""One call; returns what checks its results, or None."""
Attempt = Callable[[str, str, Callable[[], T]], T | None]
"""Of a candidate, what it is about to do, and the action: its result, or None if it failed."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one candidate, one value a round."""

    ms: tuple[float, ...]
    drift: float = 1.0

    def quantile(self, share: float) -> float:
        """The quantile, linear between the two nearest values."""
        ordered = sorted(self.ms)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def over(self, other: "Times", *, draws: int = 2000) -> tuple[float, float, float]:
        """Median of self/other within rounds, its 95 % bootstrap interval widened by the drift."""
        ratios = [a / b for a, b in zip(self.ms, other.ms, strict=True)]
        source = random.Random(0)
        medians = sorted(
            statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws)
        )
        low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
        return statistics.median(ratios), low / self.drift, high * self.drift


class Clock:
    """Times one call on a device."""

    def __init__(self, device: str) -> None:
        """`device`: "cpu" or "cuda"."""
        self.device = device
        self._flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=device)

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds of one call, caches cold."""
        return self._once(run)[0]

    def checked(self, run: Run) -> float:
        """The same; what the call made is checked when the clock stands."""
        asked = _asked_the_driver(self.device)
        ms, check = self._once(run)
        if check is not None:
            check()
        if _asked_the_driver(self.device) > asked:
            # Torch's cache held another candidate's blocks: the time contains the driver's.
            del check  # and the gradients that it holds
            ms, _ = self._once(run)
        return ms

    def _once(self, run: Callable[[], T]) -> tuple[float, T]:
        self._flush.zero_()
        if self.device == "cpu":
            begin = time.perf_counter()
            made = run()
            return (time.perf_counter() - begin) * 1e3, made
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), made


def _asked_the_driver(device: str) -> int:
    """How often torch has taken memory from a GPU's driver, or given it back."""
    if device == "cpu":
        return 0
    stats = torch.cuda.memory_stats()
    return int(stats.get("num_device_alloc", 0) + stats.get("num_device_free", 0))


def interleave(
    candidates: dict[str, Run],
    clock: Clock,
    attempt: Attempt[float],
    *,
    rounds: int,
    seconds: float,
    least: int = 5,
    earlier: Sequence[dict[str, float]] = (),
) -> Iterator[dict[str, float]]:
    """Yields the milliseconds of each round, until there are `rounds`, or fewer after `seconds`.

    A candidate that fails is taken out of `candidates`; the others' times stay.

    Args:
        candidates: the calls by name, warmed up.
        clock: of their device.
        attempt: runs an action that may fail.
        rounds: how many there are to be, `earlier` ones included.
        seconds: after them no further round begins, if there are `least`.
        least: rounds that are run however long they take.
        earlier: rounds of a process that ended.
    """
    shuffle = random.Random(len(earlier))
    begin = time.perf_counter() - sum(sum(found.values()) for found in earlier) / 1e3
    for turn in range(len(earlier), rounds):
        if not candidates or (turn >= least and time.perf_counter() - begin > seconds):
            return
        order, found = list(candidates), {}
        shuffle.shuffle(order)
        for name in order:
            run = candidates[name]
            ms = attempt(name, f"round {turn + 1}", lambda run=run: clock.checked(run))  # type: ignore[misc]
            if ms is None:
                del candidates[name]
            else:
                found[name] = ms
        yield found


def times_of(name: str, rounds: Sequence[dict[str, float]], device: str) -> Times:
    """A candidate's times in the rounds."""
    return Times(tuple(found[name] for found in rounds), DRIFT[device])
