"""The loss's arguments for a case, and the loss in plain PyTorch, forwards and backwards.

Nothing here calls our kernels: what others are measured with must stand when ours fail.
"""

from typing import Any

import torch
from torch import Tensor

import roma
from bench import data
from bench.variants import Variant

GRPO = roma.RomaConfig(lambda_inv=0.0)
ROWS, COLUMNS = 1024, 16_384  # of a tile of fp32 logits: 64 MiB


def loss_case(variant: Variant, case: data.Case) -> tuple[Tensor, dict[str, Any]]:
    """Log-probs [K+1, B, T] of N = B·T tokens, and the loss's other arguments."""
    device = case.tokens.device
    generator = torch.Generator(device).manual_seed(2)
    length = min(variant.tokens, 16 if device.type == "cpu" else 256)
    sequences = variant.tokens // length
    logp = chunked_logp(case.rows, case.weight, case.labels)
    logp = logp.view(variant.views + 1, sequences, length)
    noise = torch.randn(logp[0].shape, generator=generator, device=device)
    numbers = torch.arange(sequences, device=device)
    sampled = torch.randint(max(variant.views, 1), (sequences,), generator=generator, device=device)
    return logp, {
        "mask": torch.ones(sequences, length, dtype=torch.bool, device=device),
        "advantages": torch.where(numbers % 2 == 0, 1.0, -1.0),
        "correct": numbers < variant.right * sequences,
        "old_logp": logp[0] + 0.02 * noise,
        "aux_view": sampled if variant.views else None,
        "config": roma.RomaConfig(worst_over=variant.worst_over) if variant.views else GRPO,
    }


@torch.no_grad()
def chunked_logp(rows: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs [R] in fp32 from rows [R, D] and a head [V, D], in tiles."""
    found = []
    for states, ids in zip(rows.split(ROWS), labels.split(ROWS), strict=True):
        states, target = states.float(), torch.zeros(len(ids), device=rows.device)
        parts = []
        for start in range(0, len(weight), COLUMNS):
            logits = states @ weight[start : start + COLUMNS].float().T
            parts.append(logits.logsumexp(1))
            inside = (ids >= start) & (ids < start + logits.shape[1])
            column = (ids - start).clamp(0, logits.shape[1] - 1)
            target += torch.where(inside, logits.gather(1, column[:, None])[:, 0], 0.0)
        found.append(target - torch.stack(parts).logsumexp(0))
    return torch.cat(found)


@torch.no_grad()
def chunked_gradients(
    rows: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ g·logp by rows and head in fp32, all entries of a row at once."""
    head, by_rows, by_weight = weight.float(), [], torch.zeros_like(weight, dtype=torch.float32)
    pieces = zip(*(x.split(ROWS // 8) for x in (rows, labels, upstream)), strict=True)
    for states, ids, g in pieces:
        states = states.float()
        dz = -torch.softmax(states @ head.T, 1)
        dz.scatter_add_(1, ids[:, None], torch.ones(len(ids), 1, device=rows.device))
        dz *= g[:, None]
        by_rows.append(dz @ head)
        by_weight.addmm_(dz.T, states)
    return torch.cat(by_rows), by_weight


def plain_loss(
    clean: Tensor,
    views: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor,
    aux_view: Tensor | None,
    config: roma.RomaConfig,
) -> Tensor:
    """The default loss as one would write it (docs/MATH.md, sections 2 and 3); K = 0: GRPO's."""
    lengths = mask.sum(-1).clamp(min=1)

    def clipped(logp: Tensor) -> Tensor:
        ratio = torch.exp((logp - old_logp).clamp(-config.log_ratio_clamp, config.log_ratio_clamp))
        gains = advantages[:, None]
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = torch.maximum(-ratio * gains, -bounded * gains)
        if config.dual_clip is not None:
            ceiling = torch.where(gains < 0, -config.dual_clip * gains, torch.inf)
            loss = torch.minimum(loss, ceiling)
        return ((loss * mask).sum(-1) / lengths).mean()

    if aux_view is None:
        return clipped(clean)
    gap = (views - clean.detach()).clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    divergence = (torch.expm1(gap) - gap) * mask
    if config.worst_over == "token":
        by_sequence = _worst(divergence).sum(-1) / lengths
    else:
        by_sequence = _worst(divergence.sum(-1) / lengths)
    penalty = (by_sequence * correct).mean()
    sampled = views[aux_view, torch.arange(len(mask), device=mask.device)]
    return clipped(clean) + config.lambda_aux * clipped(sampled) + config.lambda_inv * penalty


def _worst(by_view: Tensor) -> Tensor:
    """The largest over the views; a tie is the first one's, where amax would share its gradient."""
    return by_view.gather(0, by_view.argmax(0, keepdim=True))[0]


def plain_coefficients(logp: Tensor, options: dict[str, Any]) -> Tensor:
    """∂loss/∂logp [K+1, B, T] by autograd."""
    leaf = logp.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(plain_loss(leaf[0], leaf[1:], **options), leaf)
    return found
