"""Weights, gradients and optimizer: how many parameters, and their bytes on a rank by engine.

With N parameters, n of them trained, R ranks, in bytes:

    engine   weights  gradients     AdamW
    single   4N       4n            8n
    ddp      4N       4n            8n
    zero1    4N       4n + 4n/R     8n/R + 4n/R
    zero2    4N       4n/R          8n/R + 4n/R
    zero3    4N/R     4n/R          8n/R + 4n/R
    fsdp2    4N/R     4n/R          8n/R

Weights are fp32 whatever the products' precision. Where gradients are sharded they are reduced with
each micro-batch (`roma.train.engine`). DeepSpeed steps a copy of its share of the weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from roma.models.flops import TextShape, VisionShape
from roma.train.config import Config
from roma_kernels.errors import fail

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model's parameters, and its sizes."""

    total: int
    """All, adapters included; a tied head counts once."""
    trained: int
    text_linear: int
    """Of the linear layers of the text model's body, without adapters."""
    vision: int
    layer: int
    """Of a layer of the text model."""
    outside: int
    """Of what is no layer: embedding, head, norms, the tower's embedding and mergers."""
    head_trained: bool
    text: TextShape
    tower: VisionShape
    vision_heads: int
    deepest_fed: bool
    """Whether the tower's last block feeds a text layer of its own (deepstack)."""

    @classmethod
    def of(cls, config: Config) -> "Parameters":
        """Of a run, from its model's config.json.

        Raises:
            ValueError: no such model, or one whose sizes are not known here.
        """
        return cls.count(read_model(config.worker.actor.model_path), config)

    @classmethod
    def count(cls, model: Any, config: Config) -> "Parameters":
        """Of a transformers model, with values or without, under a run's options."""
        actor, body = config.worker.actor, model.model.language_model
        vision = _numel(model.model.visual)
        base, adapters = _numel(model), 0
        if actor.lora.rank is not None:
            linear = {
                name.rpartition(".")[2]
                for name, module in body.named_modules()
                if isinstance(module, nn.Linear)
            }
            for target in actor.lora.targets:
                if target not in linear:
                    known = f"some of {', '.join(sorted(linear))}"
                    fail("worker.actor.lora.targets", known, repr(target), "correct the name")
            named = "|".join(map(re.escape, actor.lora.targets))
            adapters = sum(
                actor.lora.rank * (m.in_features + m.out_features)
                for name, m in body.named_modules()
                if isinstance(m, nn.Linear) and re.fullmatch(rf"(.*\.)?({named})", name)
            )
        own = adapters or base - (vision if actor.freeze_vision else 0)
        layers = [*body.layers, *model.model.visual.blocks]
        shape = model.config.vision_config
        fed = getattr(shape, "deepstack_visual_indexes", ())
        return cls(
            total=base + adapters,
            trained=own,
            text_linear=sum(
                m.weight.numel() for m in body.layers.modules() if isinstance(m, nn.Linear)
            ),
            vision=vision,
            layer=max(map(_numel, body.layers)),
            outside=base - sum(map(_numel, layers)),
            head_trained=not adapters,
            text=TextShape.of(model.config),
            tower=VisionShape.of(model.config),
            vision_heads=shape.num_heads,
            deepest_fed=shape.depth - 1 in fed,
        )


class States(NamedTuple):
    """Bytes on one rank, without activations."""

    weights: float
    gathered: float
    """Weights of other ranks that are there for a while."""
    gradients: float
    optimizer: float
    stepping: float
    """Temporaries of the optimizer's step."""


def states(parameters: Parameters, engine: str, ranks: int, *, half: bool, cuda: bool) -> States:
    """Bytes on one rank.

    Args:
        parameters: of the run.
        engine: one of `ENGINES`.
        ranks: R.
        half: whether products are in bfloat16, in which fsdp2 gathers.
        cuda: whether AdamW steps all weights in one launch, as on a GPU: a further number each.

    Example:
        >>> from types import SimpleNamespace
        >>> small = SimpleNamespace(total=1000, trained=800, layer=100, outside=200)
        >>> states(small, "fsdp2", 4, half=False, cuda=False)[:4]
        (1000.0, 1600.0, 800.0, 1600.0)
    """
    total, trained = FLOAT * parameters.total, FLOAT * parameters.trained
    share, gathered = trained / ranks, 0.0
    if engine in ("zero3", "fsdp2"):
        # The layer that computes, the next one, and what belongs to no layer.
        size = 2 if half and engine == "fsdp2" else FLOAT
        gathered = size * 2.0 * parameters.layer + FLOAT * parameters.outside
    held = float(total) if engine not in ("zero3", "fsdp2") else total / ranks
    if engine in ("single", "ddp"):
        return States(held, 0.0, float(trained), 2.0 * trained, trained * float(cuda))
    if engine == "fsdp2":
        return States(held, gathered, share, 2 * share, share * cuda)
    gradients = trained + share if engine == "zero1" else share
    return States(held, gathered, gradients, 3 * share, share * cuda)


def read_model(path: str | Path) -> Any:
    """The model of a folder's config.json, its weights without values.

    Raises:
        ValueError: no config.json there, or a model that is none for images and text.
    """
    if not (Path(path) / "config.json").is_file():
        remedy = "give worker.actor.model_path the folder; its config.json is enough"
        fail("model", "a folder with a config.json", f"none in {str(path)!r}", remedy)
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    if not hasattr(model.model, "get_rope_index"):
        remedy = "other families need a policy of their own"
        fail("model", "one of the Qwen-VL family", type(model).__name__, remedy)
    return model


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
