"""A policy's weights one after the other, adapters merged into copies; a folder made of them.

Nothing holds a second model: `merged_weights` makes one matrix at a time, `write_model` keeps one
file's tensors. Both work where weights are sharded (`whole`).
"""

import copy
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roma.models.lora import (
    ADAPTER,
    Whole,
    adapter_weights,
    factors,
    layers,
    merge,
    scaling,
    write_adapters,
)
from roma_kernels.errors import fail

FILE_BYTES = 5 * 10**9
"""Of a file of weights, at most, unless one tensor alone has more."""
_INDEX = "model.safetensors.index.json"


def save(
    policy: Any, folder: str | Path, *, whole: Whole = Tensor.detach, write: bool = True
) -> None:
    """Writes weights, config, tokenizer and image processor in Hugging Face form.

    Adapters are merged into copies of their matrices, and stand in peft's form in `adapter/`.

    Args:
        policy: a `roma.models.qwen_vl.Policy`.
        folder: to write.
        whole: see `roma.models.lora.Whole`.
        write: False on all ranks but one, which then do no more than take part.
    """
    model, adapted = policy.model, bool(layers(policy.model))
    weights = merged_weights(policy, whole=whole)
    factors_of = adapter_weights(model, whole=whole)
    try:
        if write:
            write_model(model, folder, weights)
            if adapted:
                write_adapters(model, Path(folder) / ADAPTER, factors_of)
    finally:  # what one rank could not write the others gather all the same
        deque(chain(weights, factors_of), maxlen=0)
    if write:
        policy.processor.save_pretrained(folder)


@torch.no_grad()
def merged_weights(policy: Any, *, whole: Whole = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name in a Hugging Face folder, in one order on all ranks.

    With adapters W + (alpha / r)·B A in W's place. A weight that two modules share comes once.

    Args:
        policy: a `roma.models.qwen_vl.Policy`.
        whole: see `roma.models.lora.Whole`.

    Yields:
        Name and tensor. A merged one is new. Any other may be the policy's own: copy what is to be
        kept, and write to none.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = policy.model
    adapted = {f"{name}.base_layer.weight": layer for name, layer in layers(model).items()}
    seen: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(weight) in seen:
            continue
        seen.add(id(weight))
        layer, made = adapted.get(name), whole(weight)
        if layer is not None:
            a, b = map(whole, factors(layer))
            made = merge(made, a, b, scaling(layer))
        plain = name.replace(".base_layer.", ".")
        yield from revert_weight_conversion(model, {plain: made}).items()


def write_model(
    model: Any,
    folder: str | Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes a model as transformers' `save_pretrained` does, from weights that come one by one.

    Args:
        model: the transformers model, for its configurations.
        folder: to write; made if missing. Weights of an earlier save there are removed.
        weights: as of `merged_weights`; each is copied to the CPU.
        file_bytes: size of a file at most.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (*folder.glob("model*.safetensors"), folder / _INDEX):
        earlier.unlink(missing_ok=True)
    files: list[list[str]] = []
    total = size = 0
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, folder / f"model-{len(files):05d}.partial", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, weight in weights:
        if held and size + weight.nbytes > file_bytes:
            flush()
            size = 0
        # A copy even on a CPU: the policy's own storage may be freed, or shared by two weights.
        held[name] = weight.detach().to("cpu", copy=True).contiguous()
        size, total = size + weight.nbytes, total + weight.nbytes
    flush()
    names: dict[str, str] = {}
    for number, keys in enumerate(files):
        several = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        file = several if len(files) > 1 else "model.safetensors"
        (folder / f"model-{number:05d}.partial").rename(folder / file)
        names |= dict.fromkeys(keys, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # as fully_shard names it
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def check_base(policy: Any, folder: str | Path, *, whole: Whole = Tensor.detach) -> None:
    """Adapters fit one base alone: this policy's, merged, must be what `folder` holds.

    Compared are the adapted matrices of the first layer. A product of r terms in fp32, added in
    any order, and its sum with W are off by (r + 2)·ε·|s|·|B|·|A| + ε·|W| at most, there and here.

    Args:
        policy: with the adapters that were read from `folder`.
        folder: of a policy that was saved with adapters.
        whole: see `roma.models.lora.Whole`.

    Raises:
        ValueError: another base; the matrix is named.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = layers(policy.model)
    first = next(iter(own)).split(".layers.")[0] + ".layers.0."
    for name, layer in own.items():
        if not name.startswith(first):
            continue
        base, a, b = (whole(x).cpu() for x in (layer.base_layer.weight, *factors(layer)))
        merged = merge(base, a, b, scaling(layer))
        (key,) = revert_weight_conversion(policy.model, {f"{name}.weight": merged})
        saved = _read(Path(folder), key)
        size = scaling(layer) * (b.abs() @ a.abs())
        eps = max(torch.finfo(x.dtype).eps for x in (saved, base))
        bound = 2 * eps * (base.abs() + (len(a) + 3) * size)
        if saved.shape != base.shape or bool(((saved - merged).abs() > bound).any()):
            remedy = "set worker.actor.model_path to the model with which the run began"
            fail(f"{folder}, {key}", "this policy's, adapters merged", "another base's", remedy)


def _read(folder: Path, key: str) -> Tensor:
    from safetensors import safe_open

    index = folder / _INDEX
    file = "model.safetensors"
    if index.is_file():
        file = json.loads(index.read_text())["weight_map"][key]
    with safe_open(folder / file, framework="pt") as content:
        found: Tensor = content.get_tensor(key)
    return found
