"""Layers that are run again in the backward pass, and what would make that wrong or void.

Non-reentrant alone. It runs a layer with its graph and drops what that saved; the backward runs the
layer once more. So gradients are those of a pass without it, bit for bit where kernels are
deterministic, whichever inputs have one. The reentrant kind runs a layer without a graph: a layer
none of whose inputs has a gradient, as above frozen embeddings, gives its adapters none, in silence
where other layers give theirs.
"""

from typing import Any

import torch
from torch import nn

from roma_kernels.errors import fail

NAME = "gradient checkpointing"
_REENTRANT = "a layer whose inputs have no gradient would give its adapters none"


def enable(policy: Any, *, reentrant: bool = False) -> None:
    """Has every layer and block of the policy's model run again in the backward pass.

    The policy is put into training mode, in which transformers checkpoints; it has no dropout.

    Args:
        policy: a `roma.models.qwen_vl.Policy`, with adapters or without, frozen tower or not.
        reentrant: False.

    Raises:
        ValueError: the reentrant kind, or a model with dropout.
    """
    if reentrant:
        fail(NAME, "reentrant=False", "True", f"leave it out: {_REENTRANT}")
    model = policy.model
    _refuse_dropout(model)
    # Nothing here is random, and on a GPU keeping the generator's state waits for the device.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    newer = getattr(model, "activation_checkpointing_enable", None)  # from transformers 5.23 on
    model.disable_input_require_grads()  # enabling it again would forget earlier hooks
    (newer or model.gradient_checkpointing_enable)(options)
    # The reentrant kind needs embeddings that ask for a gradient: transformers has them do so, in a
    # Qwen2.5-VL those of patches, too. A frozen tower would be learnt through, at thrice its cost.
    model.disable_input_require_grads()
    policy.train()


def is_enabled(model: Any) -> bool:
    """Whether layers of a transformers model are run again in the backward pass."""
    name = "is_activation_checkpointing"  # before transformers 5.23: gradient
    older = not hasattr(type(model), name)
    return bool(getattr(model, "is_gradient_checkpointing" if older else name))


def check(model: nn.Module) -> None:
    """What a pass with a graph asks of a model, whoever enabled checkpointing on it.

    A pass without one is not checked.

    Raises:
        ValueError: the reentrant kind, or in eval mode, where transformers checkpoints nothing.
    """
    if not torch.is_grad_enabled():
        return
    for name, module in model.named_modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        # A function of a user's own has no such options, and answers for itself.
        if getattr(function, "keywords", {"use_reentrant": False}).get("use_reentrant", True):
            remedy = f"call policy.checkpoint() instead: {_REENTRANT}"
            fail(NAME, "use_reentrant=False", f"another in {name or 'the model'}", remedy)
        if not module.training:
            remedy = "call policy.train(), or policy.checkpoint() after policy.eval()"
            fail(NAME, "training mode", f"eval mode in {name or 'the model'}", remedy)


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        share = module.p if isinstance(module, nn.Dropout) else 0.0
        share = share or float(getattr(module, "attention_dropout", 0.0) or 0.0)
        if share:
            remedy = "set it to 0 in the model's config.json: old and new log-probs would differ"
            fail(
                f"dropout of {name}", "0, because layers run in training mode", f"{share:g}", remedy
            )
