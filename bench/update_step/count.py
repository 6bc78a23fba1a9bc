"""What one call of an update takes: FLOP by torch's counter, and bytes saved for the backward.

`torch.utils.flop_counter` knows no formula for attention on a CPU and counts 0 for it. The formulas
here count what the kernel computes: the pairs that causal attention needs, or all of them where it
is given a mask; five products in the backward, where the scores are formed again. Our head does not
come by the counter, since it is one operator: it reports its products (`roma_kernels.products`).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from roma_kernels.products import listen

ON_A_CPU = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


class Counted(NamedTuple):
    """One call."""

    model: float
    """FLOP of text model and vision tower; of a peer the head, too."""
    head: float
    """FLOP of our head."""
    saved: float
    """Bytes of the tensors saved for a backward, at their peak: each storage once, no weights."""

    @property
    def flop(self) -> float:
        """All FLOP."""
        return self.model + self.head


def counted(call: Callable[[], object], weights: list[Tensor]) -> Counted:
    """Counts one call.

    Args:
        call: the update.
        weights: storages that are there anyway.
    """
    saved = _Saved(weights)
    counter = FlopCounterMode(display=False, custom_mapping=dict(zip(ON_A_CPU, RULES, strict=True)))
    with listen() as reports, counter, saved.hooks():
        call()
    return Counted(
        float(counter.get_total_flops()), float(sum(r.flop for r in reports)), saved.peak
    )


def _pairs(query: Tensor, key: Tensor, causal: bool) -> float:
    """(query, key) pairs of all rows and heads."""
    rows, heads, queries = query.shape[:3]
    own = queries * (queries + 1) / 2 if causal else queries * key.shape[2]
    return rows * heads * own


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> float:
    return 2.0 * _pairs(query, key, is_causal) * (query.shape[3] + value.shape[3])


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> float:
    """Scores, dV and d(weights) of size d_v; dQ and dK of size d."""
    return 2.0 * _pairs(query, key, is_causal) * (3 * query.shape[3] + 2 * value.shape[3])


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes
RULES = (_forward, _backward)


class _Saved:
    """Follows what autograd saves: storages by address, for as long as a graph holds them."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = {x.untyped_storage().data_ptr() for x in weights}
        self._holders: Counter[int] = Counter()
        self._now = 0
        self.peak = 0.0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._weights:
            size = 0
        self._holders[address] += 1
        if self._holders[address] == 1:
            self._now += size
            self.peak = max(self.peak, float(self._now))
        return _Held(tensor, lambda: self._free(address, size))

    def _free(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self._now -= size


class _Held:
    """A saved tensor; says when the graph lets go of it."""

    def __init__(self, tensor: Tensor, freed: Callable[[], None]) -> None:
        self.tensor = tensor
        self._freed = freed

    def __del__(self) -> None:
        self._freed()
