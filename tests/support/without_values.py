"""The whole loss on tensors that have shapes alone: for memory planners and exporters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from roma.testing import compare_whole

DEVICES = ("meta", "fake")


def shapes(case: dict[str, Any], device: str | None = None) -> list[torch.Size]:
    """Of loss, log-probs and worst views; None: on the case's own tensors."""
    mode = FakeTensorMode() if device == "fake" else None

    def moved(x: Tensor) -> Tensor:
        return mode.from_tensor(x) if mode else x.to("meta") if device == "meta" else x

    with mode or nullcontext():
        there = {n: moved(x) if isinstance(x, Tensor) else x for n, x in case.items()}
        out = compare_whole.call(there, "auto")
    return [x.shape for x in (out.loss, out.logp, out.view_logp, out.worst_view)]
