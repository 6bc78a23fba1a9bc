"""What is held to the oracle: a back end by name, or a function in the place of a public one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Backend = str | Callable[..., Any]


def on(public: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """The public function on a back end, or the candidate itself: it takes the same arguments."""
    return backend if callable(backend) else partial(public, backend=backend)
