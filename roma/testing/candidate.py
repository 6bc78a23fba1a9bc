"""What is held to the oracle: a back end by name, or a function that replaces a public one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Backend = str | Callable[..., Any]


def on(public: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """The public function on a back end, or the candidate itself: it takes the same arguments."""
    return backend if callable(backend) else partial(public, backend=backend)


def on_device(candidate: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The candidate on another device: tensors travel there and back, and gradients with them."""

    def moved(*positional: Any, **named: Any) -> Any:
        found = candidate(
            *(_to(device, x) for x in positional), **{n: _to(device, x) for n, x in named.items()}
        )
        return type(found)(*(_to("cpu", x) for x in found))

    return moved


def _to(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to(device, x) for name, x in value.items()}
    if not isinstance(value, Tensor):
        return value
    if 0 in value.stride():
        return value.to(device)
    # The strides too, of which Tensor.to keeps only some.
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return there.copy_(value)
