"""What a worker is told: the options of a run, what to measure, and what there is already."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bench.variants import Variant


class Budget(NamedTuple):
    """Rounds of a variant, and the seconds after which it gets no further one."""

    rounds: int
    seconds: float


BUDGET = {
    "smoke": Budget(3, 1.0),
    "quick": Budget(7, 10.0),
    "full": Budget(9, 15.0),
    "paper": Budget(9, 6.0),
    "card": Budget(9, 6.0),
    "views": Budget(15, 15.0),
    "update": Budget(9, 60.0),
}
"""By preset."""
LIMIT = 180.0
"""Seconds for one thing of a candidate; torch.compile and autotuning take most of a minute."""


@dataclass(frozen=True)
class Options:
    """How a run measures."""

    device: str
    rounds: int
    seconds: float
    limit: float = LIMIT
    """Seconds without a word after which a worker is killed."""
    providers: tuple[str, ...] | None = None
    """Names to measure beside ours; None: all."""
    with_memory: bool = True
    memory_limit: float | None = None
    """GiB that a candidate may take, if less than what is free."""
    add: tuple[str, ...] = ()
    """Modules that add to bench.providers.PROVIDERS when they are imported."""

    @classmethod
    def of(cls, preset: str, device: str, **others: Any) -> "Options":
        """With the budget of a preset."""
        return cls(device, **BUDGET[preset]._asdict() | others)


@dataclass(frozen=True)
class Job:
    """What a worker has to do, from the state in which the last one left it."""

    options: Options
    variants: list[Variant]
    gone: list[dict[str, str]]
    """By variant: candidates that need not be tried, with their reasons."""
    rounds: list[dict[str, float]] = field(default_factory=list)
    """Milliseconds of the first variant's rounds that a worker before this one has timed."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the first variant's candidates that have been compared with float64."""
    machine: bool = True
    """Whether to describe the machine."""

    def to_json(self) -> str:
        """As text, for the worker's standard input."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Of text."""
        found = json.loads(text)
        options = found.pop("options")
        for name in ("providers", "add"):
            options[name] = None if options[name] is None else tuple(options[name])
        variants = [Variant(**variant) for variant in found.pop("variants")]
        return cls(Options(**options), variants, **found)
