"""Times: providers interleaved, each round in another order, cold caches, medians and intervals.

A round times every candidate once, so that other load on the machine falls on all alike. A ratio is
taken within a round. Its interval is a bootstrap over rounds, widened by how much one run differs
from the next (`DRIFT`): by the addresses of a process's memory, and by load that lasts minutes.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Two runs of one commit on a shared machine of 2 cores: 5 of 99 ratios had bootstrap intervals that
# did not meet; widened by 10 %, all met. The GPU's figure is assumed, not measured.
DRIFT = {"cpu": 1.10, "cuda": 1.02}

FLUSH = 256 * 2**20  # bytes written between timings: more than any L2 or last-level cache

Run = Callable[[], None]


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

    def time(self, run: Run) -> float:
        """Milliseconds of one call, caches cold."""
        self._flush.zero_()
        if self.device == "cpu":
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleave(
    candidates: dict[str, Run],
    clock: Clock,
    *,
    rounds: int,
    seconds: float,
    least: int = 5,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Times]:
    """Times every candidate in `rounds` rounds, fewer (not below `least`) after `seconds`."""
    for name, run in candidates.items():
        tell(f"warming up {name}")
        run()
        run()
    order, found = list(candidates), {name: [] for name in candidates}  # type: ignore[var-annotated]
    shuffle = random.Random(0)
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= least and time.perf_counter() - begin > seconds:
            break
        shuffle.shuffle(order)
        for name in order:
            tell(f"round {turn + 1}: {name}")
            found[name].append(clock.time(candidates[name]))
    return {name: Times(tuple(ms), DRIFT[clock.device]) for name, ms in found.items()}
