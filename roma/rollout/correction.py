"""The ratio between the policy that learns and the engine that sampled, as a weight of tokens.

An engine with kernels and a precision of its own gives a token another probability than the trainer
does. Gradients taken on its tokens are then those of a policy that never sampled. An importance
weight takes this back, bounded, because its variance is not.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from roma_kernels.errors import fail

How = Literal["truncate", "mask"]
# exp of it is far outside of any cap in use, and finite in fp32.
_LARGEST = 20.0


@torch.no_grad()
def rollout_weight(
    logp_trainer: Tensor, logp_sampler: Tensor, mask: Tensor, *, how: How, cap: float
) -> tuple[Tensor, dict[str, float]]:
    """The importance weight of each token, from two log-probs of it (docs/MATH.md section 3).

        ρ_t = exp(clamp(logp_trainer_t − logp_sampler_t, ±20))
        truncate: w_t = min(ρ_t, cap)       (truncated importance sampling)
        mask:     w_t = ρ_t, or 0 outside [1/cap, cap]

    A token of which the sampler reports NaN has weight 1 and counts as clipped. Nothing is
    differentiated.

    Args:
        logp_trainer: [B, T], nats, of the policy before the update.
        logp_sampler: [B, T], nats, as the engine sampled: the same temperature.
        mask: [B, T] bool, True = counts. Log-probs outside it are not read.
        how: "truncate" or "mask".
        cap: at least 1.

    Returns:
        The weight [B, T], 1 outside the mask, in the wider dtype of the two log-probs; and metrics
        over the counted tokens, 0 without any: `rollout/mismatch_mean` and `rollout/mismatch_p99`,
        of |logp_trainer − logp_sampler| in nats; `rollout/weight_clipped_share`, of tokens whose
        weight is not their ratio.

    Raises:
        ValueError: shapes or dtypes differ from these, an unknown `how`, a cap below 1.

    Example:
        >>> trainer, sampler = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.1, 0.2]]).log()
        >>> rollout_weight(trainer, sampler, trainer < 0, how="truncate", cap=2.0)[0]
        tensor([[2., 1.]])
    """
    _check(logp_trainer, logp_sampler, mask, how, cap)
    difference = logp_trainer - logp_sampler
    missing = mask & logp_sampler.isnan()
    difference = difference.masked_fill(~mask | missing, 0.0)
    ratio = difference.clamp(-_LARGEST, _LARGEST).exp()
    outside = ratio > cap
    if how == "truncate":
        weight = ratio.clamp(max=cap)
    else:
        outside = outside | (ratio < 1 / cap)
        weight = ratio.masked_fill(outside, 0.0)
    size = difference[mask & ~missing].abs()
    counted = max(int(mask.sum()), 1)
    return weight, {
        "rollout/mismatch_mean": float(size.mean()) if len(size) else 0.0,
        "rollout/mismatch_p99": _quantile(size, 0.99),
        "rollout/weight_clipped_share": int((outside | missing).sum()) / counted,
    }


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values [n] do not exceed; 0 for none.

    Unlike torch.quantile it has no limit of 16 M values.
    """
    count = len(values)
    if not count:
        return 0.0
    rank = min(max(-int(-share * count // 1), 1), count)
    return float(values.kthvalue(rank).values)


def _check(trainer: Tensor, sampler: Tensor, mask: Tensor, how: str, cap: float) -> None:
    if trainer.ndim != 2:
        fail("logp_trainer", "[B, T]", str(list(trainer.shape)), "a row for each rollout")
    for name, given in (("logp_sampler", sampler), ("mask", mask)):
        if given.shape != trainer.shape:
            expected = f"{list(trainer.shape)}, as logp_trainer"
            fail(name, expected, str(list(given.shape)), "both score the same tokens")
    for name, given in (("logp_trainer", trainer), ("logp_sampler", sampler)):
        if not given.is_floating_point():
            fail(name, "floating point", str(given.dtype), "log-probs are nats")
    if mask.dtype != torch.bool:
        fail("mask", "bool", str(mask.dtype), "mask.bool() if 1 counts")
    if how not in get_args(How):
        fail("how", '"truncate" or "mask"', repr(how), "without a correction, do not call it")
    if not cap >= 1:  # a NaN too
        fail("cap", "at least 1", str(cap), "2 is customary")
