"""Candidates with one fault each, for a worker: a test has it import `planted_peers` or so."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import providers
from bench.providers import Score

FOREVER = 1000.0
SLEEP = "PLANTED_SLEEP"  # environment: seconds that its process sleeps, no other test's number
KILLED, REFUSED = 777, 778  # vocabularies for which planted_data builds no data


def right(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = states.float() @ weight.float().T
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]


class _Backward(torch.autograd.Function):
    """The identity; the gradient goes through a function first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.change(g), None


def _raise(error: BaseException) -> Any:
    raise error


def at_call(number: int, act: Callable[[], object]) -> Score:
    """Right, but for one call of a process.

    The first is the comparison, two warm up, then come rounds; a worker that goes on where another
    one ended compares nothing again.
    """
    calls = 0

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found = right(states, weight, tokens)
        return found if calls != number else found + (act() or 0.0)

    return score


def always(act: Callable[[], object]) -> Score:
    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        act()
        return right(states, weight, tokens)

    return score


def backwards(change: Callable[[Tensor], Tensor], *, first: int = 1) -> Score:
    """Right, but for the gradients from some call on."""
    calls = 0

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found = right(states, weight, tokens)
        return _Backward.apply(found, change) if calls >= first else found

    return score


def shifted(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return right(states, weight, tokens) - 0.5


def _hang() -> object:
    """With a process of its own beside it, which must go too."""
    return subprocess.run(["sleep", os.environ[SLEEP]], check=False)


def _segfault() -> object:
    return ctypes.string_at(0)


FAULTS: dict[str, tuple[Callable[[], Score], str]] = {
    "raises": (
        lambda: always(lambda: _raise(KeyError("no such kernel"))),
        "fails in its forward: KeyError: 'no such kernel'",
    ),
    "raises backwards": (
        lambda: backwards(lambda g: _raise(RuntimeError("CUDA error: invalid argument"))),
        "fails in its backward: RuntimeError: CUDA error: invalid argument",
    ),
    "leaves": (
        lambda: always(lambda: _raise(SystemExit("no licence"))),
        "fails in its forward: SystemExit: no licence",
    ),
    "raises in a round": (
        lambda: at_call(4, lambda: _raise(ValueError("too late"))),
        r"fails in its round \d: ValueError: too late",
    ),
    "no memory": (
        lambda: always(lambda: _raise(MemoryError("host"))),
        "out of memory in its forward: host",
    ),
    "no gpu memory": (
        lambda: backwards(lambda g: _raise(torch.OutOfMemoryError("tried to allocate 23 GiB"))),
        "out of memory in its backward: tried to allocate 23 GiB",
    ),
    "too large": (
        lambda: always(lambda: torch.empty(2**50)),
        "out of memory in its forward: .*allocate 4503599627370496 bytes",
    ),
    "wrong values": (lambda: shifted, r"refused: logp_max 5\.0\S+ exceeds \S+$"),
    "wrong gradients": (
        lambda: backwards(lambda g: 1.1 * g),
        r"refused: dhidden (9\.9|1\.0)\S+ exceeds \S+$",
    ),
    "wrong third": (
        lambda: at_call(3, lambda: -0.5),
        r"refused: logp_max 5\.0\S+ exceeds \S+ in its (warm-up|round 1)",
    ),
    "wrong in a round": (
        lambda: at_call(4, lambda: -0.5),
        r"refused: logp_max 5\.0\S+ exceeds \S+ in its round \d",
    ),
    "gradients wrong later": (
        lambda: backwards(lambda g: 1.1 * g, first=4),
        r"refused: dhidden (9\.9|1\.0)\S+ exceeds \S+ in its round \d",
    ),
    "hangs": (
        lambda: always(_hang),
        "hangs: nothing after LIMIT s in its forward",
    ),
    "hangs in a round": (
        lambda: at_call(4, lambda: time.sleep(FOREVER)),
        r"hangs: nothing after LIMIT s in its round \d",
    ),
    "exits": (lambda: always(lambda: os._exit(3)), "ended its process: code 3 in its forward"),
    "segfaults": (
        lambda: backwards(lambda g: _segfault()),
        "killed its process: SIGSEGV in its backward",
    ),
}
"""By name: what makes it, and its reason as a pattern."""


def provider(name: str, score: Score) -> providers.Provider:
    return providers.Provider(name, "torch", "planted", lambda device: score)
