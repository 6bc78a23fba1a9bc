"""How large the gradients of the penalty and of the rest of the loss are, on the head's input."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from roma import RomaConfig, roma_loss


def squared_norms(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    tokens: Tensor,
    *,
    config: RomaConfig,
    **given: Any,
) -> dict[str, Tensor]:
    """‖∂(λ_inv·L_inv)/∂h‖² and ‖∂(L − λ_inv·L_inv)/∂h‖², h the hidden states on all images.

    Two further sweeps of the head and their backward to its input: no gradient of the head's weight
    is formed, and the model is not run. Given the totals of a mini-batch, the squares of its
    micro-batches and ranks add up, as each has rows of its own.

    Args:
        hidden: as in `roma_loss`, and so are all others; nothing is left in their graphs.
        view_hidden: the same.
        weight: the same.
        tokens: the same.
        config: of the loss.
        given: further arguments of `roma_loss`.

    Returns:
        0-dim tensors "inv" and "rest".
    """
    states = [x.detach().requires_grad_() for x in (hidden, view_hidden) if x is not None]
    views = states[1] if len(states) > 1 else None
    inv = replace(
        config, main=None, ref_coef=0.0, ref_unbiased=False, entropy_coef=0.0, lambda_aux=0.0
    )
    terms = {"inv": inv, "rest": replace(config, lambda_inv=0.0)}
    found = {}
    with torch.enable_grad():
        for name, own in terms.items():
            constants = given if name == "rest" else {**given, "aux_view": None, "ref_logp": None}
            loss = roma_loss(
                states[0], views, weight.detach(), tokens, config=own, **constants
            ).loss
            slopes = torch.autograd.grad(loss, states, allow_unused=True)
            squares = [x.float().square().sum() for x in slopes if x is not None]
            found[name] = torch.stack(squares).sum() if squares else loss.new_zeros(())
    return found
