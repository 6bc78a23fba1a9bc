"""The ratio between the policy that learns and the engine that sampled: a weight, or a mask.

An engine with kernels and a precision of its own gives a token another probability than the trainer
does. Gradients taken on its tokens are then those of a policy that never sampled. An importance
weight takes this back, bounded, because its variance is not. A mask leaves rollouts out that are
both bad and too far from the policy.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from roma_kernels.errors import fail

How = Literal["truncate", "mask"]
Level = Literal["token", "sequence"]
# exp of it is far outside of any cap in use, and finite in fp32.
_LARGEST = 20.0


@torch.no_grad()
def rollout_weight(
    logp_trainer: Tensor,
    logp_sampler: Tensor,
    mask: Tensor,
    *,
    how: How,
    cap: float,
    level: Level = "token",
) -> tuple[Tensor, dict[str, float]]:
    """The importance weight of tokens or sequences, from two log-probs (docs/MATH.md section 3).

        d_t = logp_trainer_t − logp_sampler_t
        token:    ρ_t = exp(clamp(d_t, ±20))
        sequence: ρ_i = exp(clamp(Σ_t d_t, ±20))
        truncate: w = min(ρ, cap)           (truncated importance sampling)
        mask:     w = ρ, or 0 outside [1/cap, cap]

    A token of which the sampler reports NaN has weight 1, or adds nothing to its sequence's sum,
    and counts as clipped. Nothing is differentiated.

    Args:
        logp_trainer: [B, T], nats, of the policy before the update.
        logp_sampler: [B, T], nats, as the engine sampled: the same temperature.
        mask: [B, T] bool, True = counts. Log-probs outside it are not read.
        how: "truncate" or "mask".
        cap: at least 1.
        level: "token" or "sequence". A sequence's ratio is the exact one, and varies more the
            longer it is.

    Returns:
        The weight, [B, T] and 1 outside the mask, or [B] of sequences and 1 for an empty one, in
        the wider dtype of the two log-probs; and metrics over the counted tokens, 0 without any:
        `rollout/mismatch_mean` and `rollout/mismatch_p99`, of |logp_trainer − logp_sampler| in
        nats; `rollout/weight_clipped_share`, of tokens whose weight is not their ratio, or not
        their sequence's.

    Raises:
        ValueError: shapes or dtypes differ from these, an unknown `how` or `level`, a cap below 1.

    Example:
        >>> trainer, sampler = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.1, 0.2]]).log()
        >>> rollout_weight(trainer, sampler, trainer < 0, how="truncate", cap=2.0)[0]
        tensor([[2., 1.]])
    """
    _check(logp_trainer, logp_sampler, mask)
    if how not in get_args(How):
        fail("how", '"truncate" or "mask"', repr(how), "without a correction, do not call it")
    if level not in get_args(Level):
        fail("level", '"token" or "sequence"', repr(level), "choose one of them")
    if not cap >= 1:  # a NaN too
        fail("cap", "at least 1", str(cap), "2 is customary")
    difference = logp_trainer - logp_sampler
    missing = mask & logp_sampler.isnan()
    difference = difference.masked_fill(~mask | missing, 0.0)
    exponent = difference
    if level == "sequence":
        exponent = difference.double().sum(-1).to(difference.dtype)
    ratio = exponent.clamp(-_LARGEST, _LARGEST).exp()
    outside = ratio > cap
    if how == "truncate":
        weight = ratio.clamp(max=cap)
    else:
        outside = outside | (ratio < 1 / cap)
        weight = ratio.masked_fill(outside, 0.0)
    if level == "sequence":
        outside = mask & outside[:, None]
    size = difference[mask & ~missing].abs()
    counted = max(int(mask.sum()), 1)
    return weight, {
        "rollout/mismatch_mean": float(size.mean()) if len(size) else 0.0,
        "rollout/mismatch_p99": _quantile(size, 0.99),
        "rollout/weight_clipped_share": int((outside | missing).sum()) / counted,
    }


@torch.no_grad()
def off_policy_mask(
    advantages: Tensor,
    logp: Tensor,
    logp_sampler: Tensor,
    mask: Tensor,
    *,
    threshold: float,
) -> Tensor:
    """1 for rollouts to learn from, 0 for bad ones that the policy would hardly sample any more.

        0 where A_i < 0 and mean over the counted t of (logp_sampler_t − logp_t) > threshold

    (docs/MATH.md section 3; DeepSeek-V3.2, arXiv 2512.02556.) To push such a rollout further down
    teaches little, and the gradient is large. Multiply a sequence's weight by it.

    Args:
        advantages: [B], floating point; the sign is read.
        logp: [B, T] nats, of the policy that learns, at the sampler's temperature.
        logp_sampler: [B, T] nats, as the engine sampled. A NaN is no evidence: it is left out of
            the mean, and a row that has nothing else is kept.
        mask: [B, T] bool, True = counts. Log-probs outside it are not read.
        threshold: nats a token, a finite number.

    Returns:
        [B] of 0 and 1, the dtype of `advantages`, not differentiable.

    Raises:
        ValueError: shapes or dtypes differ from these, a threshold that is not finite.

    Example:
        >>> logp, sampler = torch.tensor([[-3.0], [-3.0], [-1.0]]), torch.tensor([[-1.0]] * 3)
        >>> off_policy_mask(torch.tensor([-1.0, 1.0, -1.0]), logp, sampler, logp < 0, threshold=1.0)
        tensor([0., 1., 1.])
    """
    _check(logp, logp_sampler, mask, first="logp")
    if advantages.shape != mask.shape[:1] or not advantages.is_floating_point():
        got = f"{advantages.dtype} {list(advantages.shape)}"
        remedy = "give those before any shaping by token"
        fail("advantages", f"floating point [B] = [{len(mask)}]", got, remedy)
    if not math.isfinite(threshold):
        fail("threshold", "a finite number of nats", str(threshold), "without one, do not call it")
    known = mask & ~logp_sampler.isnan()
    distance = (logp_sampler.double() - logp.double()).where(known, 0.0)
    mean = distance.sum(-1) / known.sum(-1).clamp(min=1)
    far = (mean > threshold) & known.any(-1)
    return (~((advantages < 0) & far)).to(advantages.dtype)


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values [n] do not exceed; 0 for none.

    Unlike torch.quantile it has no limit of 16 M values.
    """
    count = len(values)
    if not count:
        return 0.0
    rank = min(max(-int(-share * count // 1), 1), count)
    return float(values.kthvalue(rank).values)


def _check(trainer: Tensor, sampler: Tensor, mask: Tensor, *, first: str = "logp_trainer") -> None:
    if trainer.ndim != 2:
        fail(first, "[B, T]", str(list(trainer.shape)), "a row for each rollout")
    for name, given in (("logp_sampler", sampler), ("mask", mask)):
        if given.shape != trainer.shape:
            expected = f"{list(trainer.shape)}, as {first}"
            fail(name, expected, str(list(given.shape)), "both score the same tokens")
    for name, given in ((first, trainer), ("logp_sampler", sampler)):
        if not given.is_floating_point():
            fail(name, "floating point", str(given.dtype), "log-probs are nats")
    if mask.dtype != torch.bool:
        fail("mask", "bool", str(mask.dtype), "mask.bool() if 1 counts")
