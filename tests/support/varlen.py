"""PyTorch's variable-length attention in plain PyTorch, as its documentation has it.

A causal window stands at the bottom right: the last query sees all keys. That is what
flash-attention does since 2.1, forward and backward (`mask.h`: a query sees keys up to
row + keys - queries), and PyTorch's copy of it on NVIDIA GPUs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

REAL = inspect.signature(varlen.varlen_attn)  # of the torch that is installed


class Varlen:
    """A stand-in that keeps the arguments of its calls and asks for what the real one asks for.

    Args:
        top_left: the causal window at the top left, as ROCm's kernels have it.
    """

    def __init__(self, *, top_left: bool = False) -> None:
        """No call yet."""
        self.calls: list[dict[str, Any]] = []
        self.top_left = top_left

    def of_2_11(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: object = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """As in torch 2.11: fewer heads of keys need no word."""
        assert return_aux is None
        given = dict(locals())
        self.calls.append({name: x for name, x in given.items() if name != "self"})
        lengths = self._checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        size = query.shape[-1] ** -0.5 if scale is None else scale
        made = []
        for q, k, v in zip(
            query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
        ):
            offset = 0 if self.top_left else len(k) - len(q)
            seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
            if window_size == (-1, 0):
                seen = seen.tril(offset)
            assert window_size in ((-1, 0), (-1, -1))
            scores = torch.einsum("qhd,khd->hqk", q, k) * size
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            made.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(made)

    def of_2_13(self, *tensors: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        """As in torch 2.12 and 2.13: fewer heads of keys must be announced."""
        REAL.bind(*tensors, enable_gqa=enable_gqa, **options)
        assert enable_gqa or tensors[0].shape[1] == tensors[1].shape[1]
        return self.of_2_11(*tensors, **options)

    @staticmethod
    def _checked(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int
    ) -> list[list[int]]:
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        assert query.dtype == key.dtype == value.dtype
        assert query.ndim == 3 and key.shape == value.shape and key.shape[-1] == query.shape[-1]
        lengths = []
        for ends, total, top in zip((cu_q, cu_k), (query, key), longest, strict=True):
            assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.ndim == 1
            assert ends.device == query.device and type(top) is int
            assert ends[0] == 0 and int(ends[-1]) == len(total)
            lengths.append(ends.diff().tolist())
            assert max(lengths[-1]) == top and min(lengths[-1]) > 0
        assert len(lengths[0]) == len(lengths[1])
        return lengths
