"""FLOP of a forward and of a backward pass over packed tokens, and of the head.

A group is a prompt of L tokens and completions of t tokens. The last token of a completion predicts
nothing and is not run. A group packs L + Σ(t − 1) tokens and has

    L(L + 1)/2 + Σ [(t − 1)·L + (t − 1)·t/2]   (query, key) pairs.

A backward pass costs twice the forward's products, and 5/2 of its attention, since fused kernels
form the scores again. Where layers are checkpointed, it also runs their forward pass again, without
its last product, whose result nobody needs. Pixels have no gradient, so the embedding of patches
costs its forward only once more.

Under adapters of rank r nothing else has a gradient. A frozen matrix then costs the backward one
product, not two; the inputs of the first layer's queries, keys and values need none at all. An
adapter adds 2·r·(in + out) a token forward, and twice that backward. Checkpointed, the last product
of a layer is that of an adapter, if there is one on it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from roma.models.flops.shapes import TextShape, VisionShape

BACKWARD, BACKWARD_ATTENTION = 2.0, 2.5  # of the forward pass


class Packed(NamedTuple):
    """What passes through the text model and the vision tower; expectations need not be whole."""

    tokens: float = 0.0
    pairs: float = 0.0
    patches: float = 0.0
    patch_pairs: float = 0.0


class Group(NamedTuple):
    """A prompt of `prompt` tokens, image tokens included, and completions, in tokens."""

    prompt: int
    completions: Sequence[int]


def packed(groups: Iterable[Group]) -> Packed:
    """Tokens and pairs of groups that share their prompts.

    A row of a prompt and one completion is a group of one.

    Example:
        >>> packed([Group(4, [3, 1])])  # rows 0..3, and two tokens that see 5 and 6
        Packed(tokens=6.0, pairs=21.0, patches=0.0, patch_pairs=0.0)
    """
    tokens = pairs = 0.0
    for prompt, completions in groups:
        tokens += prompt + sum(max(t - 1, 0) for t in completions)
        pairs += prompt * (prompt + 1) / 2
        pairs += sum(max(t - 1, 0) * (prompt + t / 2) for t in completions)
    return Packed(tokens, pairs)


def images(frames: Iterable[int]) -> Packed:
    """Patches and pairs of frames of so many patches each; an image is one frame.

    Example:
        >>> images([16, 4])
        Packed(tokens=0.0, pairs=0.0, patches=20.0, patch_pairs=272.0)
    """
    patches = list(frames)
    return Packed(patches=float(sum(patches)), patch_pairs=float(sum(p * p for p in patches)))


class Adapters(NamedTuple):
    """Low-rank adapters on the text model (`roma.models.lora`), those on queries among them."""

    rank: int
    targets: Sequence[str]


class Cost(NamedTuple):
    """FLOP of the text model, the vision tower and the head."""

    text: float
    vision: float
    head: float
    tokens: float = 0.0
    """Tokens that pass through the text model forward; no FLOP."""

    @property
    def total(self) -> float:
        """FLOP of all three."""
        return self.text + self.vision + self.head


def forward(
    text: TextShape, vision: VisionShape | None, work: Packed, *, adapters: Adapters | None = None
) -> Cost:
    """A forward pass; `vision` may be None where there are no patches."""
    seen = 0.0
    if vision is not None:
        by_patch = vision.embed + vision.block + vision.merged
        seen = work.patches * (by_patch + vision.near) + work.patch_pairs * vision.pair
    by_token = text.token + (text.adapters(*adapters) if adapters else 0.0)
    return Cost(work.tokens * by_token + work.pairs * text.pair, seen, 0.0, work.tokens)


def backward(
    text: TextShape,
    vision: VisionShape | None,
    work: Packed,
    *,
    checkpointed: bool = False,
    vision_trained: bool = True,
    adapters: Adapters | None = None,
) -> Cost:
    """A backward pass; with `checkpointed`, layers and blocks are run again first."""
    attention = BACKWARD_ATTENTION + checkpointed
    again = float(checkpointed)
    if adapters:
        added, last = text.adapters(*adapters), text.last_adapter(*adapters)
        by_token = text.token - text.first(*adapters) + BACKWARD * added
        by_token += again * (text.token + added - (last or text.last))
    else:
        by_token = BACKWARD * text.token + again * (text.token - text.last)
    read = work.tokens * by_token + work.pairs * attention * text.pair
    seen = 0.0
    if vision is not None and vision_trained:
        by_patch = vision.embed + BACKWARD * (vision.block + vision.merged)
        by_patch += again * (vision.block - vision.last)
        looked = work.patches * vision.near + work.patch_pairs * vision.pair
        seen = work.patches * by_patch + attention * looked
    return Cost(read, seen, 0.0)


def head(text: TextShape, rows: float, active: float, *, trained: bool = True) -> Cost:
    """The head: one product for each row, and three more for each with a gradient.

    The three are the logits once more, and the gradients by state and by weight (docs/COST.md). A
    frozen head does without the last.
    """
    return Cost(0.0, 0.0, text.row * (rows + (2 + trained) * active))
