"""Where a model's body ends, where its head is, and what the model does to the head's logits.

Cohere scales its logits, Granite divides them, HyperCLOVA X reads the same name as a factor, Gemma
2 caps them, and a class may ignore a cap that its configuration has. So nothing is believed: the
model's own `forward` is run once with a stand-in for its body and one for its head, which costs no
product. What it does to the stand-in's logits must be

    z = c·x,  or  z = s·tanh(c·x/s)

with numbers that its configuration has, and its head must be given the body's hidden states as they
are. Else the model is refused.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from roma_kernels.errors import fail

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_CLOSE = 1e-5  # fp32 through at most five operations: 5·2⁻²⁴ = 3e-7; the next candidate is 1e-2 off


@dataclass(frozen=True)
class Transform:
    """z = s·tanh(c·x/s) of the head's product x, or c·x without s; before the temperature."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """[...] to [...], in the logits' dtype."""
        scaled = logits * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap

    def arguments(self, temperature: float) -> dict[str, float | None]:
        """`temperature` and `softcap` of `linear_logprob`: s·tanh(c·x/s)/τ is of x, s/c and τ/c."""
        cap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": cap}


def backbone_of(model: nn.Module) -> tuple[str, Any]:
    """Name and module of the body, whose `last_hidden_state` the head takes.

    Raises:
        ValueError: no such module.
    """
    for name in (getattr(model, "base_model_prefix", ""), "model"):
        module = getattr(model, name, None) if name else None
        if isinstance(module, nn.Module):
            return name, module
    remedy = "patch the causal language model itself, before it is wrapped"
    fail("model", "a model of transformers with body and head", type(model).__name__, remedy)


def head_of(model: nn.Module) -> nn.Module:
    """The module that makes logits, as it is now: FSDP and PEFT may have put it there later.

    Of a head that PEFT trains as a whole (modules_to_save), the active copy.

    Raises:
        ValueError: no head, one with an adapter, or one that is not a matrix of floats [V, D].
    """
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    name = type(model).__name__
    if not isinstance(head, nn.Module):
        remedy = "patch a causal language model (…ForCausalLM, …ForConditionalGeneration)"
        fail("model", "get_output_embeddings() to give a head", f"none of {name}", remedy)
    if hasattr(head, "modules_to_save"):
        adapters: Any = head
        active = () if adapters.disable_adapters else adapters.active_adapters
        copies = [adapters.modules_to_save[a] for a in active if a in adapters.modules_to_save]
        head = copies[0] if copies else adapters.original_module
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
        remedy = "leave the head out of target_modules (exclude_modules='lm_head'), or name it in "
        remedy += "modules_to_save"
        fail("model", "a head without an adapter", f"{type(head).__name__} in {name}", remedy)
    weight = weight_of(head)
    shape = tuple(getattr(weight, "ds_shape", () if weight is None else weight.shape))
    if weight is None or not weight.is_floating_point() or len(shape) != 2:
        got = f"{type(head).__name__} in {name} with {list(shape)}"
        remedy = "keep the head out of quantisation, and out of a unit of its own in FSDP 1"
        fail("model", "a linear head with a float weight [V, D]", got, remedy)
    return head


def weight_of(head: nn.Module) -> Tensor | None:
    """The weight, without the gather that ZeRO-3 ties to reading it as an attribute."""
    named = dict(head.named_parameters(recurse=False))
    weight = named["weight"] if "weight" in named else getattr(head, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def device_of(head: nn.Module) -> torch.device:
    """Where a head of `head_of` is; "meta" if it is offloaded."""
    weight = weight_of(head)
    assert weight is not None  # head_of has checked it
    return weight.device


def read_transform(model: nn.Module) -> Transform:
    """What the model's own forward does to its head's logits.

    Raises:
        ValueError: the forward does not run on stand-ins, changes the hidden states before the
            head, or does to the logits what no candidate does.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        remedy = "use the model's own logits and roma.roma_loss_from_logp"
        fail("model", "a decoder", f"the encoder-decoder {type(model).__name__}", remedy)
    head = head_of(model)
    names = [name for name, module in model.named_children() if module is _outer(model)]
    if not names:
        got = f"one inside another part of {type(model).__name__}"
        remedy = "use roma.linear_logprob on what that head is given"
        fail("model", "a head that is the model's own layer", got, remedy)
    depth, vocabulary = _sizes(head)
    device = device_of(head)
    device = torch.device("cpu") if device.type == "meta" else device
    # Small whole numbers are the same in every dtype.
    hidden = (torch.arange(2 * depth, device=device) % 9 - 4.0).view(1, 2, depth)
    raw = torch.linspace(-60.0, 60.0, vocabulary, device=device)
    found = _run(model, names[0], hidden, raw)
    return _choose(model, raw, found)


def _outer(model: nn.Module) -> object:
    return model.get_output_embeddings()  # type: ignore[operator]  # head_of has checked it


def _sizes(head: nn.Module) -> tuple[int, int]:
    """D and V; under ZeRO-3 the weight itself is empty."""
    weight: Any = weight_of(head)
    vocabulary, depth = getattr(weight, "ds_shape", weight.shape)
    return int(depth), int(vocabulary)


class _Body:
    """In the place of the body: gives the same hidden states whatever comes."""

    def __init__(self, original: nn.Module, hidden: Tensor) -> None:
        self._original = original
        self._hidden = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> "_States":
        return _States(self._hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _States:
    """A model's output that has hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, item: int | slice) -> Any:
        return (self.last_hidden_state,)[item]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Head:
    """In the place of the head: gives the same logits at each position, and keeps what came."""

    def __init__(self, original: nn.Module, logits: Tensor) -> None:
        self._original = original
        self._logits = logits
        self.seen: list[Tensor] = []

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append(hidden)
        return self._logits.expand(*hidden.shape[:-1], len(self._logits)).clone()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@contextmanager
def _in_place(model: nn.Module, name: str, module: object) -> Iterator[None]:
    """Not by setattr, which takes modules only; hooks of the original are not called so."""
    modules: dict[str, Any] = model._modules
    original, modules[name] = modules[name], module
    try:
        yield
    finally:
        modules[name] = original


def _run(model: nn.Module, head_name: str, hidden: Tensor, raw: Tensor) -> Tensor:
    """Logits [V] that the model's forward makes of `raw`."""
    body_name, body = backbone_of(model)
    head = _Head(getattr(model, head_name), raw)
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    name = type(model).__name__
    remedy = "use roma.linear_logprob on the states that its head is given"
    with torch.no_grad(), _in_place(model, body_name, _Body(body, hidden)):
        with _in_place(model, head_name, head):
            try:
                output: Any = type(model).forward(model, input_ids=tokens)
            except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
                got = f"{type(error).__name__} from {name}.forward: {error}"
                fail("model", "a forward of body, head and logits", got, remedy)
    logits = getattr(output, "logits", None)
    if len(head.seen) != 1 or not isinstance(logits, Tensor):
        got = f"{name}.forward, which calls it {len(head.seen)} times"
        fail("model", "a forward that calls its head once", got, remedy)
    if not torch.equal(head.seen[0].float(), hidden):
        got = f"{name}, whose forward changes them first"
        fail("model", "a head that takes the body's hidden states as they are", got, remedy)
    return logits[0, -1].float()


def _choose(model: nn.Module, raw: Tensor, found: Tensor) -> Transform:
    """The candidate that is nearest to what was found."""
    config: Any = model.config
    configs = [config.get_text_config(), config]
    factors = [x for name in SCALES for c in configs if (x := _number(c, name))]
    caps = [x for name in CAPS for c in configs if (x := _number(c, name))]
    scales = dict.fromkeys([1.0, *factors, *(1 / x for x in factors)])
    candidates = [Transform(*pair) for pair in product(scales, dict.fromkeys([None, *caps]))]
    if found.shape == raw.shape:
        errors = [_apart(candidate(raw), found) for candidate in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        if errors[best] <= _CLOSE:
            return candidates[best]
    name, shown = type(model).__name__, [round(float(x), 4) for x in raw[[0, -1]]]
    got = f"{name}, whose logits {shown} become {[round(float(x), 4) for x in found[[0, -1]]]}"
    remedy = "use roma.linear_logprob with its temperature and softcap"
    known = ", ".join([*SCALES, *CAPS])
    fail("model", f"logits that are scaled or capped as one of {known} says", got, remedy)


def _apart(left: Tensor, right: Tensor) -> float:
    return float(((left - right).abs() / (right.abs() + 1)).max())


def _number(config: object, name: str) -> float | None:
    """A finite number > 0, or None: MPT's logit_scale is None or a word."""
    value = getattr(config, name, None)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None  # type: ignore[arg-type,operator]
