"""VGPO: more for what looks at the image, by token and by rollout (arXiv 2604.09349).

With h the last layer's hidden state of a token and μ the mean one of its prompt's image tokens
(docs/MATH.md section 4), T the counted tokens of a sequence and t = 1…T their places:

    ρ_t = ½(cos(h_t, μ) + 1)
    w_t = ρ_t·(1 + G_t·β·t/T)            G_t = 1 for the top κ of ρ among the last γ, else 0
    ψ_t = minmax(w)_t − mean             over the sequence
    φ_i = minmax(Σ_t w_t)_i − mean       over the rollouts of the prompt
    Â_t = A·(1 + ψ_t)·(1 + φ_i)          1 + ψ kept in [0.1, 2], 1 + φ in [0.9, 2]

minmax(x) = (x − min)/(max − min + 1e-8). The gate looks at the places from ⌊(1 − γ)T⌋ on, counted
from 0, and passes the best max(1, ⌊κ·n⌋) of these n, ties included. The two bounds, the 1e-8 and
the gate's roundings are read in the official code.

`variant="code"` is what the official code does otherwise: ρ_t = cos − min(0, min cos) of the
sequence; (t − 1)/(T − 1) in the place of t/T; and the Σ of a rollout over minmax(w). Two things of
that code are taken in neither: it knows groups as rows that stand side by side in a micro-batch,
which here are the prompts of the whole batch, and the release shifts and scales cos by the
micro-batch's own extremes.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from roma.advantages.inputs import check_finite, check_group, check_mask, per_token
from roma_kernels.arguments import FLOATS, check_dtype, check_shape, check_tensor
from roma_kernels.errors import fail

Variant = Literal["paper", "code"]

_EPS = 1e-8
# Elements of hidden states in float64 at a time: 64 MiB.
_CHUNK = 1 << 23


@torch.no_grad()
def reweight(
    advantages: Tensor,
    hidden: Tensor,
    image_state: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    beta: float = 0.3,
    gamma: float = 0.5,
    kappa: float = 0.2,
    variant: Variant = "paper",
) -> Tensor:
    """Advantages by token, larger where the hidden state is near to the image's.

    The formula stands at the top of the module. Both factors are positive: the sign of A stays. A
    single token has ψ = 0, a prompt of one rollout φ = 0, and so have equal ones; a prompt without
    an image, whose image_state is 0, keeps its A. Batches that are split by whole prompts give the
    same as the whole.

    Args:
        advantages: [B] or [B, T], fp32 or fp64.
        hidden: [B, T, D] of any floating point, after the last norm. Turned to float64 by a few
            rows at a time: no second [B, T, D].
        image_state: [B, D] floating point, the mean of `hidden` over the image tokens of each
            rollout's prompt; 0 for a prompt without any.
        mask: [B, T] bool, True = counts. Nothing is read outside it.
        group: [B] int64, the prompt of each rollout: all rollouts of a prompt, in any order.
        beta: β ≥ 0.
        gamma: γ in (0, 1].
        kappa: κ in (0, 1].
        variant: "paper" or "code".

    Returns:
        [B, T], the dtype of `advantages`, 0 outside the mask, not differentiable.

    Raises:
        TypeError: not a tensor.
        ValueError: other shapes or dtypes, numbers that are not finite where the mask is True, an
            option outside of its range.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> mask, prompt = torch.ones(1, 2, dtype=torch.bool), torch.tensor([7])
        >>> reweight(torch.tensor([1.0]), hidden, hidden[:, 0], mask, prompt)
        tensor([[1.5000, 0.5000]])
    """
    own = per_token(advantages, mask)
    options = {"beta": beta, "gamma": gamma, "kappa": kappa}
    weight = weights(hidden, image_state, mask, group, variant=variant, **options)
    return (own * weight).to(advantages.dtype)


@torch.no_grad()
def weights(
    hidden: Tensor,
    image_state: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    beta: float = 0.3,
    gamma: float = 0.5,
    kappa: float = 0.2,
    variant: Variant = "paper",
) -> Tensor:
    """The factor (1 + ψ_t)(1 + φ_i) of `reweight`: [B, T] float64, > 0, and 0 outside the mask.

    Arguments and errors as those of `reweight`.
    """
    _check(hidden, image_state, mask, group)
    _check_options(beta, gamma, kappa, variant)
    if not mask.numel():
        return mask.double()
    as_code = variant == "code"
    cosine = _cosine(hidden, image_state, mask)
    # As float64: products of a number with bools, and quotients of integers, would be float32.
    count, place = mask.sum(-1, keepdim=True).double(), mask.cumsum(-1).double()
    if as_code:
        rho = cosine - cosine.where(mask, math.inf).amin(-1, keepdim=True).clamp(max=0.0)
        late = (place - 1) / (count - 1).clamp(min=1)
    else:
        rho, late = (cosine + 1) / 2, place / count.clamp(min=1)
    gate = _gate(rho, place, count, mask, gamma, kappa).double()
    w = (rho * (1 + beta * gate * late)).where(mask, 0.0)
    low = w.where(mask, math.inf).amin(-1, keepdim=True)
    high = w.where(mask, -math.inf).amax(-1, keepdim=True)
    scaled = ((w - low) / (high - low + _EPS)).where(mask, 0.0)
    token = (1 + scaled - scaled.sum(-1, keepdim=True) / count.clamp(min=1)).clamp(0.1, 2.0)
    total = (scaled if as_code else w).sum(-1)
    rollout = (1 + _within_group(total, group)).clamp(0.9, 2.0)
    seen = (image_state != 0).any(-1, keepdim=True)
    return (token * rollout[:, None]).where(seen, 1.0).where(mask, 0.0)


def _cosine(hidden: Tensor, image_state: Tensor, mask: Tensor) -> Tensor:
    """cos(h_t, μ) [B, T] float64, 0 outside the mask and where h or μ is 0."""
    B, T, D = hidden.shape
    target = torch.nn.functional.normalize(image_state.detach().double(), dim=-1)
    found = torch.empty(B, T, dtype=torch.float64, device=hidden.device)
    rows = max(_CHUNK // max(T * D, 1), 1)
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        h = hidden[part].detach().double()
        length = h.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        # A sum of products, not a matrix product: equal states give equal cosines, and tie.
        found[part] = (h * target[part, None]).sum(-1) / length
    check_finite("hidden", found, mask)
    return found.where(mask, 0.0).clamp(-1.0, 1.0)


def _gate(
    rho: Tensor, place: Tensor, count: Tensor, mask: Tensor, gamma: float, kappa: float
) -> Tensor:
    """G [B, T] bool: the top κ of ρ among the last γ of each sequence."""
    # 1e-9: ⌊0.1·10⌋ is 1, whatever 1 − 0.9 is in binary.
    begin = ((1 - gamma) * count + 1e-9).floor()
    late = mask & (place > begin)
    passed = (kappa * late.sum(-1, keepdim=True).double() + 1e-9).floor().clamp(min=1).long()
    among = rho.where(late, -math.inf)
    least = among.sort(-1, descending=True).values.gather(-1, passed - 1)
    return late & (among >= least)


def _within_group(total: Tensor, group: Tensor) -> Tensor:
    """Returns minmax − mean of numbers [B] over the rows of the same group."""
    ids, member, size = group.unique(return_inverse=True, return_counts=True)
    empty = total.new_zeros(len(ids))
    low = empty.scatter_reduce(0, member, total, "amin", include_self=False)[member]
    high = empty.scatter_reduce(0, member, total, "amax", include_self=False)[member]
    scaled = (total - low) / (high - low + _EPS)
    return scaled - (empty.index_add(0, member, scaled) / size)[member]


def _check(hidden: Tensor, image_state: Tensor, mask: Tensor, group: Tensor) -> None:
    check_mask(mask)
    check_group(group, mask)
    check_tensor("hidden", hidden, like=mask)
    check_dtype("hidden", hidden, FLOATS)
    if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
        expected = f"[B, T, D] = [{mask.shape[0]}, {mask.shape[1]}, D]"
        fail("hidden", expected, str(list(hidden.shape)), "give a state for each token of the mask")
    check_tensor("image_state", image_state, like=mask)
    check_dtype("image_state", image_state, FLOATS)
    shape = (hidden.shape[0], hidden.shape[2])
    remedy = "give each rollout the mean state of its prompt's image tokens"
    check_shape("image_state", image_state, ("[B, D]", shape), remedy=remedy)
    check_finite("image_state", image_state, torch.ones_like(image_state, dtype=torch.bool))


def _check_options(beta: float, gamma: float, kappa: float, variant: str) -> None:
    if not 0 <= beta < math.inf:
        fail("beta", "a finite number ≥ 0", str(beta), "0.3 is the published one")
    for name, value, usual in (("gamma", gamma, 0.5), ("kappa", kappa, 0.2)):
        if not 0 < value <= 1:
            fail(name, "a share in (0, 1]", str(value), f"{usual} is the published one")
    if variant not in get_args(Variant):
        fail("variant", '"paper" or "code"', repr(variant), "choose one of them")
