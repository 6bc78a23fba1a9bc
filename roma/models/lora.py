"""Low-rank adapters on a policy's text model: W x + (alpha / r)·B A x, W frozen, A and B trained.

Source: Hu et al., LoRA, arXiv 2106.09685. The layers are peft's, put into the model in place
(`peft.inject_adapter_in_model`), not around it: `policy.model` stays the transformers model that it
was, with its class, its `.model` and `.lm_head`, its `generate`, the attention of shared prompts
and the head's weight, which the fused loss reads as a plain matrix.

Adapters are fp32, or fp64 in a model of fp64. There is no dropout: the log-probs that score a
rollout and those that learn from it would be of two policies.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roma.models.flops import Adapters
from roma_kernels.errors import fail

ADAPTER = "adapter"
"""Folder of the adapters inside that of a saved policy."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Whole = Callable[[Tensor], Tensor]
"""Makes a weight whole. Where weights are sharded every rank calls it, for the same ones."""

_NAME = "default"  # peft's name for an adapter, and that of its files
_BODY = "model.language_model"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REFUSED = {
    "lm_head": "the fused loss reads the head's weight itself, and would miss an adapter on it",
    "embed_tokens": "the head may share their weight, which the fused loss reads itself",
}


def add_adapters(
    policy: Any,
    *,
    rank: int,
    alpha: float = 32.0,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
) -> None:
    """Puts adapters into a policy, in place; from then on they alone are trained.

    B starts at 0, so that the policy is the same function as before. The vision tower gets none,
    and is frozen as all else is. Call it before an optimizer or an engine takes the weights.

    Args:
        policy: a `roma.models.qwen_vl.Policy` without adapters.
        rank: r, at least 1.
        alpha: the product is scaled by alpha / r.
        targets: names of linear layers of the text model, such as "q_proj".
        seed: of A, the same on every rank.

    Raises:
        ImportError: peft is not installed.
        ValueError: a rank or alpha out of range, a target that is no linear layer of the text
            model's body (the head is none), or a policy that has adapters.
    """
    if rank < 1:
        fail("lora.rank", "at least 1", str(rank), "a power of two from 8 to 64 is usual")
    if not 0 < alpha < float("inf"):
        fail("lora.alpha", "a positive number", str(alpha), "leave it at 32")
    model = policy.model
    if layers(model):
        fail("policy", "one without adapters", "one that has some", "load the policy anew")
    peft = _peft()
    pattern = _pattern(model, targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)
    config.base_model_name_or_path = str(model.name_or_path)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
    added = {id(w) for layer in layers(model).values() for w in factors(layer)}
    for weight in policy.parameters():
        weight.requires_grad_(id(weight) in added)
        if id(weight) in added and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()  # a step of 1e-5 would be lost in bf16


def _pattern(model: Any, targets: Sequence[str]) -> str:
    """The targets as peft takes them: a regular expression for whole names of modules."""
    if isinstance(targets, str) or not targets:
        remedy = "for example targets=['q_proj', 'v_proj']"
        fail("lora.targets", "a list of names", repr(targets), remedy)
    body = model.get_submodule(_BODY)
    there = {name.split(".")[-1] for name, m in body.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if target in _REFUSED:
            remedy = f"leave it out: {_REFUSED[target]}"
            fail("lora.targets", "layers of the text model's body", repr(target), remedy)
        if target not in there:
            expected = "linear layers of the text model: " + ", ".join(sorted(there))
            fail("lora.targets", expected, repr(target), "correct the name")
    names = "|".join(map(re.escape, targets))
    return rf"(.*\.)?{_BODY.split('.')[-1]}\.(.*\.)?({names})"


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers of peft in a model, by the name of the linear layer whose place each has."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def adapters_of(model: nn.Module) -> Adapters | None:
    """Rank and targets of a model's adapters, as the FLOP model takes them; None without any."""
    own = layers(model)
    if not own:
        return None
    targets = tuple(dict.fromkeys(name.split(".")[-1] for name in own))
    return Adapters(int(next(iter(own.values())).r[_NAME]), targets)


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r] of one of peft's layers."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def scaling(layer: Any) -> float:
    """The factor alpha / r."""
    return float(layer.scaling[_NAME])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which a model is its frozen base, number for number, and builds no graph.

    Without a graph since a checkpointed layer would be run again with adapters, after the context.

    Raises:
        ValueError: a model without adapters.
    """
    own = layers(model)
    if not own:
        remedy = "load the reference as a policy of its own, or set worker.actor.lora.rank"
        fail("policy.reference()", "a policy with adapters", "one without", remedy)
    on = [layer for layer in own.values() if not layer.disable_adapters]
    trained = [(w, w.requires_grad) for layer in on for w in factors(layer)]
    try:
        for layer in on:
            layer.enable_adapters(False)
        with torch.no_grad():
            yield
    finally:
        for layer in on:
            layer.enable_adapters(True)
        for weight, was in trained:  # peft has all of them trained
            weight.requires_grad_(was)


@torch.no_grad()
def merge(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale·B A in a new tensor, computed in the adapters' dtype, returned in that of W."""
    with torch.autocast(base.device.type, enabled=False):
        return (base.to(a.dtype) + (b @ a) * scale).to(base.dtype)


@torch.no_grad()
def adapter_weights(
    model: nn.Module, *, whole: Whole = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The adapters' factors under peft's names for them, in one order on all ranks.

    Args:
        model: with adapters.
        whole: see `Whole`.
    """
    for name, layer in layers(model).items():
        for letter, weight in zip("AB", factors(layer), strict=True):
            yield _key(name, letter), whole(weight)


def _key(name: str, letter: str) -> str:
    return f"base_model.model.{name}.lora_{letter}.weight"


def write_adapters(model: Any, folder: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes adapters as `peft.PeftModel.from_pretrained(base, folder)` reads them.

    Args:
        model: with adapters.
        folder: to write; made if missing.
        weights: of `adapter_weights`.
    """
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    replace(model.peft_config[_NAME], inference_mode=True).save_pretrained(str(folder))
    found = {name: weight.to("cpu", copy=True).contiguous() for name, weight in weights}
    save_file(found, Path(folder) / _FILES[1], metadata={"format": "pt"})


@torch.no_grad()
def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Reads adapters that `write_adapters` wrote into those of a model, in place, bit for bit.

    Args:
        model: with adapters of the same rank, scale and targets, not sharded.
        folder: of the adapters.

    Raises:
        ValueError: no such files, or adapters of another form.
    """
    from safetensors.torch import load_file

    own = layers(model)
    for file in _FILES:
        if not (Path(folder) / file).is_file():
            remedy = "give the folder of a policy that was saved with adapters"
            fail("adapters", f"a folder with {file}", str(folder), remedy)
    if not own:
        remedy = "set worker.actor.lora as it was, or load the merged model above it"
        fail("adapters", "a policy with adapters to read them into", "one without", remedy)
    config = json.loads((Path(folder) / _FILES[0]).read_text())
    saved = load_file(Path(folder) / _FILES[1])
    odd = sorted(saved.keys() ^ {_key(name, letter) for name in own for letter in "AB"})
    if odd:
        _refuse(folder, f"{odd[0]} {'there and not here' if odd[0] in saved else 'not there'}")
    for name, layer in own.items():
        was, now = config["lora_alpha"] / config["r"], scaling(layer)
        if was != now:
            _refuse(folder, f"alpha / r = {was:g} there and {now:g} here")
        for letter, weight in zip("AB", factors(layer), strict=True):
            value = saved[_key(name, letter)]
            if value.shape != weight.shape:
                ranks = f"rank {config['r']} there and {layer.r[_NAME]} here"
                _refuse(folder, f"{name} has {ranks}")
            weight.copy_(value)


def _refuse(folder: str | Path, difference: str) -> None:
    remedy = "set worker.actor.lora as it was, or choose another trainer.out"
    fail(str(folder), "adapters of this policy's form", f"others: {difference}", remedy)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora: needs peft, which is not installed; pip install peft") from error
    return peft
