"""The loss that swift should have returned, from log-probs, in any dtype: docs/MATH.md 2 and 3."""

from typing import Any

import torch
from torch import Tensor

from roma.integrations import options as roma_options

LOW = HIGH = 0.2  # swift's --epsilon, which no test changes
TAU = {True: 1.0, False: 1.05}  # sapo's temperatures for A > 0 and the others: swift's defaults


def needed(call: Any, options: roma_options.RomaOptions) -> list[tuple[int, int]]:
    """(view, row) that have a gradient or take part in a maximum, view after view."""
    pairs = []
    for view in range(options.num_views):
        for row, right in enumerate(call.right):
            right = right and bool(call.mask[row].any())
            moved = bool((call.advantages[row][call.mask[row]] != 0).any())
            sampled = int(call.aux_view[row]) == view and moved and options.lambda_aux > 0
            if call.images[row] and (sampled or (right and options.lambda_inv > 0)):
                pairs.append((view, row))
    return pairs


def loss(
    call: Any,
    options: roma_options.RomaOptions,
    kind: str,
    *,
    steps: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What `_compute_loss_and_metrics` returns for a micro-batch on one rank, and d/d logp.

    Args:
        call: what was captured.
        options: the user's.
        kind: --loss_type.
        steps: micro-batches of a step.
        dtype: of the arithmetic.
    """
    logp = call.logp.detach().to(dtype).requires_grad_()
    mask, length = call.mask.to(dtype), call.mask.sum(1).clamp(min=1).to(dtype)
    gain, batch = call.advantages.to(dtype), len(mask)
    weight = getattr(call, "weight", torch.ones(())).to(dtype)  # the sampler correction
    clean = logp[:batch]
    fixed = clean.detach()
    old = fixed if call.old is None else call.old.to(dtype)
    counts = {"dapo": call.num_items / steps, "cispo": call.num_items / steps}
    counts["bnpo"] = mask.sum()

    def mean(terms: Tensor) -> Tensor:
        if kind in ("grpo", "sapo"):
            return ((terms * mask).sum(1) / length).mean()
        if kind == "dr_grpo":
            return (terms * mask).sum() / (batch * call.max_length)
        return (terms * mask).sum() / counts[kind]

    def clipped(scored: Tensor, low: float, high: float) -> Tensor:
        ratio = (scored - old).exp()
        return -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain) * weight

    if kind == "cispo":
        ratio = (clean - old).exp().clamp(max=HIGH).detach()
        main = mean(-ratio * gain * clean)
    elif kind == "sapo":
        tau = torch.where(gain > 0, TAU[True], TAU[False]).to(dtype)
        main = mean(-4 / tau * torch.sigmoid(tau * ((clean - old).exp() - 1)) * gain)
    else:
        main = mean(clipped(clean, LOW, HIGH))

    views = torch.stack([fixed] * options.num_views)
    for place, (view, row) in enumerate(needed(call, options)):
        spot = torch.zeros_like(views, dtype=torch.bool)
        spot[view, row] = True
        views = torch.where(spot, logp[batch + place], views)
    seen = torch.tensor([bool(own) for own in call.images])
    right = torch.tensor(call.right).bool() & seen
    gap = views - fixed if options.penalty_ratio == "view/clean" else fixed - views
    each = torch.where(call.mask, gap, 0)
    each = each.expm1() - each
    if options.worst_over == "token":
        worst = each.amax(0).sum(1) / length
    else:
        worst = (each.sum(2) / length).amax(0)
    over = batch if options.penalty_over == "all" else max(call.total_right, 1) / steps
    penalty = (worst * right).sum() / over
    low, high = (0.2, 0.3) if kind in ("cispo", "sapo") else (LOW, HIGH)
    drawn = views[call.aux_view, torch.arange(batch)]
    aux = mean(clipped(drawn, low, high) * seen[:, None])
    total = main + options.lambda_aux * aux + options.lambda_inv * penalty
    (slope,) = torch.autograd.grad(total / steps, logp)
    return total.detach(), slope
