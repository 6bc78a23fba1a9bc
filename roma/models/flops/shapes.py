"""The sizes of a model that decide its FLOP, read from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roma_kernels.errors import fail

REMEDY = "nothing here counts it: name the form of the update, do not have it chosen"

# The fields by which a configuration says that its layers are a mixture of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class TextShape:
    """The sizes of a dense text model of the Llama and Qwen families."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> "TextShape":
        """The shape of a Hugging Face configuration, of a model or of its text part.

        Raises:
            ValueError: a mixture of experts, or layers that are not full attention.

        Example:
            >>> from types import SimpleNamespace
            >>> config = SimpleNamespace(model_type="qwen3", num_hidden_layers=36, hidden_size=2560,
            ...     intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
            ...     head_dim=128, vocab_size=151936)
            >>> round(TextShape.of(config).token / 1e9, 2)  # GFLOP a token, forward
            7.27
        """
        text = getattr(config, "text_config", config)
        name = getattr(text, "model_type", type(text).__name__)
        for field in EXPERTS:
            if getattr(text, field, None):
                fail(
                    "model",
                    "dense layers",
                    f"{name}, a mixture of experts ({field} = {getattr(text, field)})",
                    REMEDY,
                )
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            fail(
                "model",
                "layers of full attention",
                f"{name} with {', '.join(sorted(kinds))}",
                REMEDY,
            )
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab=text.vocab_size,
        )

    @property
    def token(self) -> float:
        """FLOP of the linear layers for a token, forward."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return 2.0 * self.layers * self.hidden * (attention + 3 * self.intermediate)

    @property
    def last(self) -> float:
        """Those of the last product of each layer, which a checkpointed layer does not repeat."""
        return 2.0 * self.layers * self.hidden * self.intermediate

    def first(self, rank: int, targets: Sequence[str]) -> float:
        """FLOP of the first layer's queries, keys and values, and of the A of their adapters."""
        made = (self.heads + 2 * self.kv_heads) * self.head_dim
        adapted = sum(name in ("q_proj", "k_proj", "v_proj") for name in targets)
        return 2.0 * self.hidden * (made + rank * adapted)

    def adapters(self, rank: int, targets: Sequence[str]) -> float:
        """FLOP of adapters of a rank for a token, forward; no linear layer but these counts."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outer = {
            **{"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries},
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.intermediate),
        }
        return 2.0 * self.layers * rank * sum(self.hidden + outer[name] for name in targets)

    def last_adapter(self, rank: int, targets: Sequence[str]) -> float:
        """FLOP of the last product of each layer if it is an adapter's, else 0."""
        return 2.0 * self.layers * rank * self.hidden * ("down_proj" in targets)

    @property
    def pair(self) -> float:
        """FLOP of a (query, key) pair, forward."""
        return 4.0 * self.layers * self.heads * self.head_dim

    @property
    def row(self) -> float:
        """FLOP of a row of the head, one product."""
        return 2.0 * self.hidden * self.vocab


@dataclass(frozen=True)
class VisionShape:
    """The sizes of the vision tower of a Qwen3-VL or a Qwen2.5-VL."""

    depth: int
    hidden: int
    intermediate: int
    inputs: int
    """Numbers of a patch: channels · frames · side²."""
    merge: int
    """A token is merge × merge patches."""
    mergers: int
    """1, and one for each block whose features go into the text model (deepstack)."""
    out: int
    products: int = 2
    """Of a block's MLP: 3 if it is gated."""
    windowed: int = 0
    """Blocks that see a window of patches alone."""
    window: int = 0
    """Patches of a window."""

    @classmethod
    def of(cls, config: Any) -> "VisionShape":
        """The shape of a Hugging Face configuration, of a model or of its vision part.

        Raises:
            ValueError: another tower.
        """
        vision = getattr(config, "vision_config", config)
        name = str(getattr(vision, "model_type", type(vision).__name__))
        kind = name.removesuffix("_vision")
        if kind not in ("qwen3_vl", "qwen2_5_vl"):
            fail("model", "the vision tower of Qwen3-VL or Qwen2.5-VL", name, REMEDY)
        side, frames = _one(vision.patch_size), _one(vision.temporal_patch_size)
        sizes: dict[str, int] = {
            "depth": vision.depth,
            "hidden": vision.hidden_size,
            "intermediate": vision.intermediate_size,
            "inputs": vision.in_channels * frames * side**2,
            "merge": vision.spatial_merge_size,
            "out": vision.out_hidden_size,
        }
        if kind == "qwen3_vl":
            return cls(mergers=1 + len(vision.deepstack_visual_indexes), **sizes)
        return cls(
            mergers=1,
            products=3,
            windowed=vision.depth - len(vision.fullatt_block_indexes),
            window=(vision.window_size // side) ** 2,
            **sizes,
        )

    @property
    def embed(self) -> float:
        """FLOP of a patch's embedding."""
        return 2.0 * self.hidden * self.inputs

    @property
    def block(self) -> float:
        """FLOP of the linear layers of all blocks for a patch, forward."""
        mlp = self.products * self.intermediate
        return 2.0 * self.depth * self.hidden * (4 * self.hidden + mlp)

    @property
    def last(self) -> float:
        """Those of the last product of each block."""
        return 2.0 * self.depth * self.hidden * self.intermediate

    @property
    def merged(self) -> float:
        """FLOP of the mergers for a patch."""
        wide = self.hidden * self.merge**2
        return 2.0 * self.mergers * (wide**2 + wide * self.out) / self.merge**2

    @property
    def pair(self) -> float:
        """FLOP of a (query, key) pair of an image, forward, in the blocks that see all of it."""
        return 4.0 * (self.depth - self.windowed) * self.hidden

    @property
    def near(self) -> float:
        """FLOP of a patch's attention in the blocks that see its window alone, forward."""
        return 4.0 * self.windowed * self.hidden * self.window


def _one(size: Any) -> int:
    """A size that a configuration gives once, or for each axis."""
    return int(size if isinstance(size, int) else size[-1])
