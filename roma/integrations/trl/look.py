"""What is run of a micro-batch beside its clean rows, and with which inputs."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from roma.integrations.options import RomaOptions
from roma.integrations.terms import pairs_of
from roma.integrations.trl import fields
from roma.integrations.trl.fields import Alternative, Fields, Joined
from roma.integrations.views import Pair, RowImages, ViewMaker, draw_aux_view


@dataclass
class Look:
    """A micro-batch's views: what is run with the clean rows, and what came of it.

    Attributes:
        prompts: B prompts, as token ids with their padding.
        aux_view: [B] int64, CPU.
        has_views: [B] bool, CPU.
        images: of the clean rows, where views are degraded images.
        others: [B][K], where a view_fn made the views; equal rows share one list.
        pairs: R pairs (view, row).
        names: their corruptions.
        logp: [B, T] nats, once the forward was run.
        pair_logp: [R, T].
    """

    prompts: list[tuple[int, ...]]
    aux_view: Tensor
    has_views: Tensor
    images: RowImages | None = None
    others: list[list[Alternative]] | None = None
    pairs: list[Pair] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    logp: Tensor | None = None
    pair_logp: Tensor | None = None

    def identities(self) -> list[Hashable]:
        """B + R keys: clean rows, or pairs of a view, with equal keys have equal inputs."""
        if self.images is not None:
            rows: list[Hashable] = list(zip(self.prompts, self.images.keys, strict=True))
        else:
            assert self.others is not None
            rows = [(p, id(own)) for p, own in zip(self.prompts, self.others, strict=True)]
        return [*rows, *(rows[row] for _, row in self.pairs)]


class Looks:
    """Draws the views of micro-batches.

    Args:
        options: K, pool, λ's.
        maker: of degraded images; None where a view_fn makes the views.
        pad: token id that prompts are padded with.
    """

    def __init__(self, options: RomaOptions, maker: ViewMaker | None, pad: int) -> None:
        """Keeps them."""
        self.options, self.maker, self.pad = options, maker, pad

    def of(self, inputs: dict[str, Any], *, lean: bool) -> Look:
        """The views of a micro-batch as TRL hands it to the loss.

        Args:
            inputs: TRL's, with roma_step, roma_correct and, of a view_fn, roma_views.
            lean: only the pairs that matter.
        """
        ids, mask = inputs["completion_ids"].cpu(), inputs["completion_mask"].cpu().bool()
        completions = [row[own].tolist() for row, own in zip(ids, mask, strict=True)]
        prompts = [tuple(row) for row in inputs["prompt_ids"].tolist()]
        (step,) = set(inputs["roma_step"].tolist())
        if self.maker is not None:
            own = fields.of(inputs)
            images = self.maker.read(
                own.get("pixel_values"),
                own.get("image_grid_thw"),
                fields.counts(own, len(ids)),
                step=step,
            )
            drawn = self.maker.aux_view(images, completions)
            look = Look(prompts, drawn, images.has_views, images=images)
        else:
            others = inputs["roma_views"]
            keys = [" ".join(map(str, own[0].ids.tolist())) if own else "" for own in others]
            drawn = draw_aux_view(self.options, keys, completions, step=step)
            seen = torch.tensor([bool(own) for own in others])
            look = Look(prompts, drawn, seen, others=others)
        correct, gains = inputs["roma_correct"], inputs["advantages"]
        look.pairs = pairs_of(
            correct, look.aux_view, gains, look.has_views, self.options, lean=lean
        )
        look.names = [
            f"view_{pair[0]}" if look.images is None else look.images.corruption(pair)
            for pair in look.pairs
        ]
        return look

    def rows(self, look: Look, ids: Tensor, attention: Tensor, keep: int, own: Fields) -> Joined:
        """The clean rows, then the pairs: what one forward takes.

        Args:
            look: of this micro-batch.
            ids: [B, P + T].
            attention: [B, P + T].
            keep: T.
            own: multimodal fields of the B rows.
        """
        if not look.pairs:
            return Joined(ids, attention, own, keep)
        if look.others is not None:
            chosen = [(row, look.others[row][view]) for view, row in look.pairs]
            return fields.joined(ids, attention, keep, own, chosen, self.pad)
        assert self.maker is not None and look.images is not None
        picked = [*range(len(ids)), *(row for _, row in look.pairs)]
        both = fields.take(own, picked)
        views = self.maker.pixels(look.images, look.pairs)
        both["pixel_values"] = torch.cat([own["pixel_values"], views])
        return Joined(ids[picked], attention[picked], both, keep)
