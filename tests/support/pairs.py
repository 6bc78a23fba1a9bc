"""Dense calls of the loss as calls on pairs: which to keep, and where they are laid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import roma
from roma.testing import compare_whole, oracle, tensors
from roma.testing.candidate import Backend
from roma.testing.strategies import LossSpec


def laid_out(case: dict[str, Any], keep: Tensor, *, seed: int = 0, spare: int = 2) -> dict:
    """A dense case with the kept pairs [K, B] alone, in a drawn order, NaN rows between them.

    Differentiable: a gradient by the case's own view_hidden is zero where a pair is not kept.
    """
    views, packed = case["view_hidden"], case["cu_seqlens"] is not None
    lengths = spans(case)
    begins, flat = lengths.cumsum(0) - lengths, views.flatten(1, -2)
    blocks: list[Any] = [*keep.nonzero().tolist(), *[None] * spare]
    parts, at = [flat.new_zeros(0, flat.shape[-1])], 0
    rows = torch.full(keep.shape, -1)
    for number, n in enumerate(torch.randperm(len(blocks), generator=tensors.generator(seed))):
        size = 3 if packed else case["mask"].shape[1]
        part = flat.new_full((size, flat.shape[-1]), float("nan"))
        if blocks[n] is not None:
            view, i = blocks[n]
            part = flat[view, begins[i] : begins[i] + lengths[i]]
            rows[view, i] = at if packed else number
        parts.append(part)
        at += len(part)
    joined = torch.cat(parts)
    if not packed:
        joined = joined.view(len(blocks), *views.shape[-2:])
    return case | {"view_hidden": joined, "view_rows": rows}


def spans(case: dict[str, Any]) -> Tensor:
    """Tokens of each sequence, masked ones too, [B]."""
    if case["cu_seqlens"] is not None:
        return case["cu_seqlens"].diff().long()
    return torch.full((len(case["mask"]),), case["mask"].shape[1])


def counted(case: dict[str, Any]) -> Tensor:
    """Counted tokens of each sequence, [B]."""
    rows = oracle.counted_rows(case["mask"], case["cu_seqlens"])
    return torch.tensor([len(tokens) for tokens in rows])


def moves(case: dict[str, Any]) -> Tensor:
    """Whether a sequence has a counted token with an advantage, [B] bool."""
    rows, given = oracle.counted_rows(case["mask"], case["cu_seqlens"]), case["advantages"]
    if given.shape == (len(rows),):
        return (given != 0) & (counted(case) > 0)
    return torch.stack([(given.flatten()[tokens] != 0).any() for tokens in rows])


def sampled(case: dict[str, Any], keep: Tensor) -> Tensor:
    """The kept pairs, and those of the auxiliary loss."""
    if case["aux_view"] is None or not case["config"].lambda_aux > 0:
        return keep
    drawn = torch.nn.functional.one_hot(case["aux_view"], len(keep)).T.bool()
    return keep | (drawn & moves(case))


def needed(case: dict[str, Any]) -> Tensor:
    """Every pair that can matter, [K, B] bool: what a lean update runs."""
    k, b = len(case["view_hidden"]), len(case["correct"])
    right = case["correct"] & (counted(case) > 0)
    return sampled(case, (right & (case["config"].lambda_inv > 0)).expand(k, b))


def two_pass(case: dict[str, Any], worst_view: Tensor) -> Tensor:
    """Of the needed pairs of a right sequence the worst alone: what a second pass runs.

    Where the gate leaves no view, view 0.
    """
    keep = needed(case)
    which = torch.arange(len(keep))[:, None] == worst_view.clamp(min=0)
    return sampled(case, keep & case["correct"] & which)


def on_pairs(backend: str, *, seed: int = 0, **options: Any) -> Backend:
    """A candidate for the dense call: all its pairs, laid in view_hidden in a drawn order."""

    def loss(*tensors_: Tensor, **named: Any) -> roma.RomaLoss:
        case = dict(zip(("hidden", "view_hidden", "weight", "tokens"), tensors_, strict=True))
        keep = named.pop("keep", None)
        if keep is None:
            keep = torch.ones(len(case["view_hidden"]), len(named["correct"]), dtype=torch.bool)
        called = laid_out(case | named, keep, seed=seed) | options
        return roma.roma_loss(**called, backend=backend)

    return loss


@dataclass(frozen=True)
class PairSpec(LossSpec):
    """A call whose other pairs have the clean image's states: to the loss, as if not run.

    Its own objective would differ: the log-probs of a pair that is not there are constants.
    """

    keep: str = "needed"

    def make(self) -> dict[str, Any]:
        """The arguments of roma_loss, dense."""
        case = super().make()
        absent = ~self.kept(case)
        if case["cu_seqlens"] is not None:
            absent = absent.repeat_interleave(spans(case), dim=1)
        at = absent[..., None] if case["cu_seqlens"] is not None else absent[..., None, None]
        return case | {"view_hidden": torch.where(at, case["hidden"], case["view_hidden"])}

    def kept(self, case: dict[str, Any]) -> Tensor:
        """[K, B]; of any case with the same constants if keep is "needed"."""
        if self.keep == "needed" or not self.k:
            return needed(case)
        return two_pass(case, compare_whole.expect(LossSpec.make(self)).worst_view)
