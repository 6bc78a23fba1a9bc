"""Bytes that a forward pass keeps for its backward, from the sizes of a micro-batch.

What each operation of transformers' Qwen3-VL and of `roma.models.prefix` saves, each storage once,
was read off autograd's saved tensors. b is the bytes of a number in the products' precision, 4 or
2 under autocast; residuals of the text model, norms and softmax stay fp32. A layer of the text
model keeps, of a token, with D hidden, I intermediate, Q = H·d queries, K = H'·d keys:

    two norms        2·(4D + 4D)       input, and normed input (for the norm's own weight)
    their readers    D·(3 + 2)·b       autocast makes a copy for each; in fp32 they share one: 2·4D
    norms of q, k    (4 + b)·(Q + K)
    attention        2·Q·b + 4H        queries and output, and the softmax's sums
                     2·Q·b a key       keys and values of all heads; K instead of Q with flash
    output product   Q·b               its input (flash: the output itself)
    MLP              4·I·b

A key is a token that an attention sequence sees: a completion's are its prompt's and its own. A
weight that is not trained needs no input kept: a term falls away with it. Checkpointed layers keep
their input alone, and one of them everything, while it is run again.
"""

from dataclasses import dataclass
from typing import NamedTuple

from roma.train.config import Config
from roma.train.estimate.states import FLOAT, Parameters
from roma.train.estimate.work import MicroBatch

INDEX = 8  # bytes


@dataclass(frozen=True)
class Options:
    """What of a run decides about activations."""

    half: bool
    """Products in bfloat16, by autocast."""
    checkpointed: bool
    vision_trained: bool
    adapted: tuple[str, ...] | None
    """Layers with adapters, if these alone are trained."""
    rank: int
    """Of the adapters."""
    flash: bool
    """Variable-length flash attention for shared prompts: an NVIDIA GPU, in bfloat16."""

    @classmethod
    def of(cls, config: Config, *, cuda: bool) -> "Options":
        """Of a run, on a GPU or not."""
        actor, half = config.worker.actor, config.trainer.dtype == "bfloat16"
        adapted = None if actor.lora.rank is None else actor.lora.targets
        return cls(
            half=half,
            checkpointed=actor.gradient_checkpointing,
            vision_trained=not actor.freeze_vision and adapted is None,
            adapted=adapted,
            rank=actor.lora.rank or 0,
            flash=cuda and half,
        )

    @property
    def size(self) -> int:
        """b, bytes."""
        return 2 if self.half else FLOAT

    def trains(self, name: str) -> bool:
        """Whether a linear layer of the text model has a weight, or an adapter, that is trained."""
        return self.adapted is None or name in self.adapted


class Kept(NamedTuple):
    """Bytes that the backward of a micro-batch needs, without copies of weights."""

    kept: float
    """From the forward on."""
    rerun: float
    """Of the checkpointed layer that is run again, the largest; 0 without checkpoints."""

    @property
    def total(self) -> float:
        """At the peak."""
        return self.kept + self.rerun


def activations(parameters: Parameters, batch: MicroBatch, options: Options) -> Kept:
    """Bytes kept for the backward of one micro-batch.

    Args:
        parameters: of the run.
        batch: what is run with a graph.
        options: of the run.
    """
    text, layer = parameters.text, _text_layer(parameters, batch, options)
    outer = batch.tokens * (INDEX + 1 + FLOAT)  # ids, image mask, and the last norm's sums
    outer += batch.tokens * FLOAT * text.hidden * (2 if options.adapted is None else 1)
    # cos and sin, and where sequences stand: of all layers once.
    shared = batch.tokens * 2 * FLOAT * text.head_dim
    shared += INDEX * (batch.queries + batch.keys + batch.tokens) * batch.shared
    rows = batch.rows * (FLOAT * text.hidden + 4 * INDEX)
    tower, block = _tower(parameters, batch, options)
    if not options.checkpointed:
        first = batch.tokens * _without_gradient(parameters, options)
        return Kept(outer + shared + rows + text.layers * layer - first + tower, 0.0)
    inputs = text.layers * batch.tokens * FLOAT * text.hidden
    return Kept(outer + rows + inputs + tower, max(layer + shared, block))


def casts(parameters: Parameters, options: Options) -> float:
    """Bytes of the weights' copies in bfloat16.

    Autocast makes them once a forward and keeps them to its end; the graph keeps them to the
    backward's. Of weights that are not trained checkpointed layers make them when they are run.
    """
    if not options.half:
        return 0.0
    text = parameters.text
    if options.adapted is None:
        vision = parameters.vision if options.vision_trained else 0
        return 2.0 * (parameters.text_linear + vision)
    layer = parameters.text_linear / text.layers
    if options.checkpointed:
        return 2.0 * layer
    # The first layer's readers of embeddings pass no gradient on.
    first = text.hidden * text.head_dim * (text.heads + 2 * text.kv_heads)
    return 2.0 * (parameters.text_linear - first + parameters.trained)


def _without_gradient(parameters: Parameters, options: Options) -> float:
    """Bytes of a token that the first layer does not keep where the embeddings have no gradient.

    Its first norm has none then, nor have queries and keys that no adapter makes.
    """
    if options.adapted is None:
        return 0.0
    text, numbers = parameters.text, 0
    for name, heads in (("q_proj", text.heads), ("k_proj", text.kv_heads)):
        numbers += heads * (text.head_dim + 1) * (name not in options.adapted)
    return float(FLOAT * (text.hidden + 1 + numbers))


def _text_layer(parameters: Parameters, batch: MicroBatch, options: Options) -> float:
    """Bytes of one layer of the text model."""
    text, size = parameters.text, options.size
    hidden, wide = text.hidden, text.intermediate
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    whole = options.adapted is None
    token = 0.0
    for readers in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        token += FLOAT * (hidden + 1 + hidden * whole)
        count = sum(map(options.trains, readers))
        token += hidden * (size * count if options.half else FLOAT * min(count, 1))
    token += (FLOAT + size * whole) * (queries + keys) + FLOAT * (text.heads + text.kv_heads)
    token += size * queries * (options.trains("o_proj") and not (options.flash and batch.shared))
    token += size * wide * (3 + options.trains("down_proj"))
    if not whole:
        assert options.adapted is not None
        token += size * options.rank * len(options.adapted)
    own = batch.queries * (2 * size * queries + FLOAT * text.heads)
    seen = batch.keys * 2 * size * (keys if options.flash and batch.shared else queries)
    masks = 0.0 if options.flash else size * batch.mask_entries
    return batch.tokens * token + own + seen + masks


def _tower(parameters: Parameters, batch: MicroBatch, options: Options) -> tuple[float, float]:
    """Bytes of the vision tower (its blocks' inputs alone, if checkpointed), and of one block."""
    if not options.vision_trained:
        return 0.0, 0.0
    tower, size = parameters.tower, options.size
    block = batch.patches * (
        size * (11 * tower.hidden + tower.products * tower.intermediate)
        + 4 * FLOAT
        + FLOAT * parameters.vision_heads
    )
    turned = batch.patches * 2 * FLOAT * tower.hidden / parameters.vision_heads  # cos and sin
    outer = size * tower.inputs + 4 * (INDEX + FLOAT)
    outer += tower.mergers * (3 * size * tower.hidden + 2 * FLOAT)
    outer += size * tower.hidden  # what the last block gives
    if options.checkpointed:
        return batch.patches * (outer + tower.depth * size * tower.hidden), block + turned
    return batch.patches * outer + turned + tower.depth * block, block
