"""Imported by a worker: the whole loss fails in parts, and a peer spoils its process."""

import sys
from typing import Any

from support.planted import _Backward, provider
from torch import Tensor

import roma
from bench.providers import PROVIDERS

from_logp, whole = roma.roma_loss_from_logp, roma.roma_loss
spoilt = False


def completion(*arguments: Any, **named: Any) -> roma.RomaLoss:
    """Ours, which can do plain PyTorch alone."""
    if named["backend"] != "torch":
        raise RuntimeError("no kernel image")
    return from_logp(*arguments, **named)


def scaled(hidden: Tensor, *arguments: Any, **named: Any) -> roma.RomaLoss:
    """Ours with gradients that are too large by a tenth."""
    return whole(_Backward.apply(hidden, lambda g: 1.1 * g), *arguments, **named)


def spoils(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """As a kernel that writes where it must not: nothing works in that process afterwards."""
    global spoilt
    spoilt = True
    raise RuntimeError("CUDA error: an illegal memory access")


roma.roma_loss_from_logp, roma.roma_loss = completion, scaled  # type: ignore[assignment]
sys.modules["__main__"].healthy = lambda device: not spoilt  # type: ignore[attr-defined]
PROVIDERS.append(provider("spoils", spoils))
