"""Watching what runs.

A dispatch mode that counts products and remembers dtypes and the largest tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's own FlopCounterMode misses the in-place addmm_, with which chunks are accumulated.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}


class Watch(TorchDispatchMode):
    """Inside `with Watch() as w:` every operation of this thread's forward and backward passes by.

    products: FLOP of matrix products, two per multiply-add. largest: elements of the largest new
    tensor. peak: the most bytes that new tensors held at one time.
    float64: names of operations that made a float64 tensor of one dimension or more.
    """

    def __init__(self) -> None:
        """Start from zero."""
        super().__init__()
        self.products = 0
        self.largest = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.float64: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run func and take note."""
        body = OPDEFS.get(func._schema.name)
        if body is not None:  # an operator in Python: what happens inside counts, not the call
            with self:
                return body._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
            self.products += 2 * left.numel() * right.shape[-1]
        before = {
            id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.ndim == 0:
                continue
            if x.dtype == torch.float64:
                self.float64.append(str(func))
            if id(x.untyped_storage()) not in before:
                self.largest = max(self.largest, x.numel())
                storage = x.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out
