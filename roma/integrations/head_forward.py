"""A model's forward with `fused_lm_head=True`: body, then log-probs by `roma.linear_logprob`.

The head's own module is called, with another forward for the time of the call. So whatever brings
its weight into place (ZeRO-3 and FSDP gather it in hooks of the module, and reduce its gradient in
others) does so, before the loss and again before the backward.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from roma import linear_logprob
from roma.integrations.head_fields import Scored, fields
from roma.integrations.head_probe import Transform, backbone_of, device_of, head_of
from roma_kernels.errors import fail

_IGNORED = -100  # of labels
_AT_PATCH_TIME = ("outputs", "temperature", "backend", "workspace")


@dataclass(frozen=True)
class HeadSettings:
    """How a patched model computes its log-probs."""

    transform: Transform
    temperature: float
    outputs: tuple[str, ...]
    fp32: bool  # hidden states are converted first, so that dh is summed into fp32
    backend: str
    workspace: int | None


def fused_forward(model: nn.Module, settings: HeadSettings) -> Callable[..., Any]:
    """The forward to put on `model`, bound; the model's own is in it for all other calls."""
    # A forward that something else put on this model; a copy of the model has its class's.
    before = model.__dict__.get("forward")
    before = getattr(before, "roma_before", before) if settings_of(model) else before

    # `generate` and trainers read the original's signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head:
            own = (labels, shift_labels, num_items_in_batch)
            return _fused(self, settings, own, args, kwargs)
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return (
            type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        )

    forward.roma_settings = settings  # type: ignore[attr-defined]  # so that it is known again
    forward.roma_before = before  # type: ignore[attr-defined]
    return types.MethodType(forward, model)


def settings_of(model: nn.Module) -> HeadSettings | None:
    """Of a model whose forward is ours now."""
    return getattr(model.__dict__.get("forward"), "roma_settings", None)


def _fused(
    model: Any,
    settings: HeadSettings,
    given: tuple[Tensor | None, Tensor | None, Tensor | int | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output's fields, [B, S − 1] from `labels` or [B, S] from `shift_labels`.

    With `states_at` [N], positions in a row of packed prompts, `shift_labels` and the fields are
    [1, N]: one state may predict the first token of several completions (`roma.models.prefix`).
    """
    labels, shift_labels, num_items = given
    if labels is None and shift_labels is None:
        remedy = "pass labels=, −100 where nothing is scored, or call without fused_lm_head"
        fail("labels", "ids [B, S] with fused_lm_head=True", "None", remedy)
    for name in _AT_PATCH_TIME:
        if name in kwargs:
            remedy = "give it to patch_lm_head"
            fail(name, "nothing in a call", repr(kwargs[name]), remedy)
    if kwargs.get("logits_to_keep"):
        got, remedy = repr(kwargs["logits_to_keep"]), "mask with labels of −100 instead"
        fail("logits_to_keep", "nothing with fused_lm_head=True", got, remedy)
    states_at = kwargs.pop("states_at", None)
    kwargs = {**kwargs, "use_cache": False, "return_dict": True}
    kwargs.pop("logits_to_keep", None)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    output = backbone_of(model)[1](*args, **kwargs)
    hidden = output.last_hidden_state
    batch, length = hidden.shape[:2]
    if shift_labels is None:
        assert labels is not None  # checked above
        _check_labels("labels", labels, (batch, length))
        targets = labels[:, 1:]
    else:
        shape = (batch, length) if states_at is None else (1, len(states_at))
        _check_labels("shift_labels", shift_labels, shape)
        targets = shift_labels
    head = head_of(model)
    device = device_of(head)
    if device.type == "meta":
        remedy = "keep the head on a device: device_map={..., 'lm_head': 0}"
        fail("lm_head", "a weight that is there", "one that is offloaded", remedy)
    hidden, targets = hidden.to(device), targets.to(device)
    mask = targets != _IGNORED
    if states_at is None:
        # Positions in [B, S], whose last column has no label unless labels are shifted already.
        rows = nn.functional.pad(mask, (0, length - mask.shape[1])).flatten().nonzero()[:, 0]
    else:
        rows = states_at.to(device)[mask[0]]
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    found = _at_head(head, states, targets[mask], settings)
    place = mask.flatten().nonzero()[:, 0]
    per_token = {name: _spread(x, place, mask) for name, x in found.items()}
    log_probs = per_token["log_probs"]
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    loss = -log_probs.sum() / (count.to(device) if isinstance(count, Tensor) else count)
    aux_loss = _balance(model, output, kwargs)
    if aux_loss is not None:
        loss = loss + _of_experts(model, "router_aux_loss_coef", default=0.0) * aux_loss
    return _output()(loss=loss, label_mask=mask, aux_loss=aux_loss, **per_token)


def _check_labels(name: str, labels: Tensor, shape: tuple[int, int]) -> None:
    if tuple(labels.shape) != shape:
        remedy = "give each position of the body's output a label, −100 for none"
        fail(name, f"[B, S] = {list(shape)}", str(list(labels.shape)), remedy)


def _spread(found: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """[n] to where `mask` [B, T'] holds; elsewhere 0. Of no row it is a differentiable 0."""
    blank = found.new_zeros(mask.numel())
    return blank.index_put((place,), found).view(mask.shape)


def _at_head(
    head: nn.Module, states: Tensor, tokens: Tensor, settings: HeadSettings
) -> dict[str, Tensor]:
    """Fields of n rows, computed inside of the head's own call."""

    def forward(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return tuple(_score(head, hidden, tokens, settings).values())

    # Its work is operators already; and a graph could not hold a forward that changes.
    call = torch.compiler.disable(_called_as, reason="roma's head is one operator")
    found = call(head, forward, states)
    return dict(zip(_names(settings), found, strict=True))


def _called_as(head: nn.Module, forward: Callable[..., Any], states: Tensor) -> Any:
    with _replaced(head, forward):
        return head(states)


@contextmanager
def _replaced(head: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own


def _names(settings: HeadSettings) -> list[str]:
    """In the order of `_score`."""
    return ["log_probs", *(name for name in settings.outputs if name != "log_probs")]


def _score(
    head: nn.Module, hidden: Tensor, tokens: Tensor, settings: HeadSettings
) -> dict[str, Tensor]:
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    if hasattr(weight, "full_tensor"):
        remedy = "use FSDP2, or give each rank's slice to roma.linear_logprob with vocab_group="
        fail("lm_head", "a weight that is whole inside of its layer", "a DTensor", remedy)
    hidden, weight = _in_precision(hidden, weight, settings)
    names = _names(settings)
    arguments: dict[str, Any] = settings.transform.arguments(settings.temperature)
    arguments |= {"backend": settings.backend, "workspace": settings.workspace}
    found = linear_logprob(
        hidden,
        weight,
        tokens,
        bias=bias,
        entropy="entropy" in names or "is_top1" in names,
        **arguments,
    )
    per_row = {"log_probs": found.logp}
    if found.entropy is not None:
        per_row["entropy"] = found.entropy
    entropy = None if found.entropy is None else found.entropy.detach()
    kept = (hidden.detach(), weight.detach(), None if bias is None else bias.detach(), tokens)
    scored = Scored(*kept, logp=found.logp.detach(), lse=found.lse, entropy=entropy, **arguments)
    per_row |= fields(scored, settings.outputs)
    return {name: per_row[name] for name in names}


def _in_precision(hidden: Tensor, weight: Tensor, settings: HeadSettings) -> tuple[Tensor, Tensor]:
    """Under autocast both are rounded as nn.Linear rounds them; the logits stay fp32."""
    if settings.fp32:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)), weight
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _balance(model: Any, output: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of the model's own module, when router logits were asked for."""
    if not kwargs.get("output_router_logits"):
        return None
    own_module = sys.modules[type(model).__module__]
    function: Any = getattr(own_module, "load_balancing_loss_func", None)
    if function is None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        function = load_balancing_loss_func
    experts = _of_experts(model, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _of_experts(model, "num_experts_per_tok")
    found: Tensor = function(output.router_logits, experts, chosen, kwargs.get("attention_mask"))
    return found


def _of_experts(model: Any, *names: str, default: float | None = None) -> Any:
    """The model's own number, or its configuration's."""
    for owner in (model, model.config.get_text_config()):
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    if default is None:
        remedy = "leave output_router_logits out"
        fail("model", f"a configuration with {' or '.join(names)}", type(model).__name__, remedy)
    return default


def _output() -> type:
    """TRL's class where its trainers are loaded, so that theirs is what they get."""
    found = getattr(sys.modules.get("trl.trainer.utils"), "FusedCausalLMOutput", None)
    if found is None:
        from roma.integrations.head_output import FusedHeadOutput

        return FusedHeadOutput
    return found
