"""New weights for a vLLM engine of this process, and the proof that all of them arrived.

vLLM takes weights by `reload_weights(weights_iterator=…)`: it gathers the tensors of a layer,
repacks them as its kernels want them and copies them to where they are read. It only warns of a
layer for which none came, and says nothing of one that got a part of its own, whose rest is then
memory that nobody wrote. So the names are held to the model's here, on both sides.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from roma_kernels.errors import fail

Named = tuple[str, Tensor]


def weight_names(config: Any) -> tuple[set[str], set[str]]:
    """The names of a model's weights, from its configuration: all that must come, all that may.

    A head that is the embedding may come under its own name or not at all.

    Args:
        config: of a transformers image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    known = set(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return known - tied, known


def checked(
    weights: Iterable[Named], required: set[str], known: set[str], dtype: torch.dtype
) -> Iterator[Named]:
    """The same weights in `dtype`, each a copy.

    vLLM keeps what it is given until a layer is complete; the tensor of a sharded trainer is gone
    by then, and that of a plain one is cast anyway.

    Raises:
        ValueError: a name that the model does not have, before it is handed on; a name that did
            not come, at the end.
    """
    remedy = "the trainer's weights and vLLM's model differ: give Hugging Face names, merged"
    missing = set(required)
    for name, tensor in weights:
        if name not in known:
            fail("weights", "names of the model", name, remedy)
        missing.discard(name)
        yield name, tensor.detach().to(dtype, copy=True)
    if missing:
        fail("weights", "every weight of the model", f"none for {some(missing)}", remedy)


def reload(worker: Any, weights: Iterable[Named]) -> None:
    """Puts weights into the model of a vLLM worker: a function for `LLM.collective_rpc`.

    Raises:
        ValueError: a parameter of vLLM's model got none; those of `checked`.
    """
    model = worker.get_model()
    wanted = {name for name, _ in model.named_parameters()}
    loaded: set[str] = set()
    load = model.load_weights

    def recording(given: Iterable[Named]) -> Any:
        found = load(given)
        loaded.update(found)
        return found

    model.load_weights = recording  # an attribute of this object hides the method of its class
    try:
        worker.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
    finally:
        del model.load_weights
    _pack_heads(model)
    if left := wanted - loaded:
        remedy = "this vLLM reads other names: take a version that docs/ROLLOUTS.md lists"
        fail("weights", "every parameter of vLLM's model loaded", f"not {some(left)}", remedy)


def _pack_heads(model: Any) -> None:
    """On a CPU a head that is the embedding keeps a packed copy of it, which stays the old one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def some(names: Iterable[str]) -> str:
    """Up to three of them, in order, and how many more there are."""
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[:2]])
    return f"{shown} and {len(rest) - 2} more" if len(rest) > 2 else shown
