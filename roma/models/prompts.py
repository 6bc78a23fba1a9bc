"""What a policy reads: prompts with their images, and what the vision tower made of these."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from roma.models.processor import Image


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, padded on the left, with their images at model resolution."""

    input_ids: Tensor  # [P, L] int64
    attention_mask: Tensor  # [P, L] int64, 1 = a token
    position_ids: Tensor  # [3, P, L] int64: time, height, width
    next_position: Tensor  # [P] int64: position of the first completion token
    images: list[list[Image]]  # per prompt, uint8 [H, W, 3]
    pixel_values: Tensor  # [Σ gh·gw, C] fp32, the images of all prompts in order
    grids: Tensor  # [n, 3] int64
    first_image: list[int]  # [P + 1]: prompt p owns images first_image[p]..first_image[p + 1]
    padded: bool

    @cached_property
    def lengths(self) -> list[int]:
        """[P]: tokens of each prompt."""
        found: list[int] = self.attention_mask.sum(-1).tolist()
        return found

    def features_of(self, features: "ImageFeatures", rows: Tensor) -> "ImageFeatures":
        """What rows [R] read, the prompt of each given, from the features of all images."""
        return features.gather([i for p in rows.tolist() for i in self.images_of(p)])

    @cached_property
    def _patch_ends(self) -> list[int]:
        return [0, *self.grids.prod(-1).cumsum(0).tolist()]

    def select(self, prompts: Sequence[int]) -> "PromptBatch":
        """Some of the prompts, for micro-batches; keeps the padding."""
        own, first = list(prompts), [0]
        for p in own:
            first.append(first[-1] + self.first_image[p + 1] - self.first_image[p])
        return replace(
            self,
            input_ids=self.input_ids[own],
            attention_mask=self.attention_mask[own],
            position_ids=self.position_ids[:, own],
            next_position=self.next_position[own],
            images=[self.images[p] for p in own],
            pixel_values=self.gather(self.pixel_values, own),
            grids=self.grids[[i for p in own for i in self.images_of(p)]],
            first_image=first,
        )

    def images_of(self, prompt: int) -> range:
        """Numbers of a prompt's images."""
        return range(self.first_image[prompt], self.first_image[prompt + 1])

    def patches(self, prompt: int) -> slice:
        """The patches of a prompt's images in `pixel_values`, and in those of a view."""
        low, high = self.first_image[prompt], self.first_image[prompt + 1]
        return slice(self._patch_ends[low], self._patch_ends[high])

    def gather(self, pixel_values: Tensor, prompts: Sequence[int]) -> Tensor:
        """The patches of some prompts' images, of the clean images or of a view."""
        if list(prompts) == list(range(len(self.images))):
            return pixel_values
        own = [pixel_values[self.patches(p)] for p in prompts]
        return torch.cat(own) if own else pixel_values[:0]


@dataclass(frozen=True)
class ImageFeatures:
    """Outputs of the vision tower for n images, [tokens, D] each; `deepstack` by level."""

    embeddings: list[Tensor]
    deepstack: list[list[Tensor]]

    def part(self, first: int, count: int) -> "ImageFeatures":
        """The features of `count` images from number `first` on."""
        return self.gather(range(first, first + count))

    def joined(self, other: "ImageFeatures") -> "ImageFeatures":
        """These features, then those of other images."""
        levels = zip(self.deepstack, other.deepstack, strict=True) if other.deepstack else []
        deepstack = [[*a, *b] for a, b in levels] or self.deepstack
        return ImageFeatures([*self.embeddings, *other.embeddings], deepstack)

    def gather(self, images: Sequence[int]) -> "ImageFeatures":
        """The features of `images`, in that order; an image may stand there twice."""
        return ImageFeatures(
            [self.embeddings[i] for i in images],
            [[level[i] for i in images] for level in self.deepstack],
        )

    def encoder_outputs(self) -> dict[str, Any] | None:
        """As a model of transformers takes them in the place of its vision tower's."""
        if not self.embeddings:
            return None
        output = SimpleNamespace(
            pooler_output=tuple(self.embeddings), deepstack_features=self.deepstack
        )
        return {"image": output}


def positions_of(
    model: Any, input_ids: Tensor, mask: Tensor, grids: Tensor, first: Sequence[int]
) -> Tensor:
    """[3, P, L] of prompts; those of one shape (marks, grids, padding) are computed once.

    Args:
        model: of transformers, which numbers them.
        input_ids: [P, L] int64, padded on the left.
        mask: [P, L] int64, 1 = a token.
        grids: [n, 3] int64, of all images.
        first: [P + 1]: prompt p owns images first[p]..first[p + 1].
    """
    kinds = (input_ids == model.config.image_token_id).to(torch.int32)
    keys = [
        (kinds[p].numpy().tobytes(), mask[p].numpy().tobytes(), str(grids[a:b].tolist()))
        for p, (a, b) in enumerate(pairwise(first))
    ]
    made: dict[Any, Tensor] = {}
    for p, key in enumerate(keys):
        if key not in made:
            made[key], _ = model.model.get_rope_index(
                input_ids[p : p + 1],
                kinds[p : p + 1],
                image_grid_thw=grids[first[p] : first[p + 1]],
                attention_mask=mask[p : p + 1],
            )
    return torch.cat([made[key] for key in keys], dim=1)
