"""MSSR: advantages of one rollout per prompt (arXiv 2512.18215; docs/MATH.md section 4).

With a single rollout there is no group to compare it with. A tracker remembers how often each
prompt was answered right, and that is the baseline:

    v = α/(α + β)      A = r − v      then  α ← η·α + r,  β ← η·β + 1 − r

A is whitened over the whole batch, of all ranks (`whiten`), and then enlarged or softened where
the policy is unsure (`shape_by_entropy`). A step of a trainer:

    raw = tracker.advantage(prompt_ids, rewards)
    advantages = shape_by_entropy(whiten(raw), sampled_entropy(logp), mask)
    …                                # the update
    tracker.observe_kl(kl)           # how far it moved the policy
"""

import math

import torch
from torch import Tensor

from roma.advantages.beta_tracker import BetaTracker, Forgetting
from roma.advantages.inputs import check_finite, check_per_sequence, check_per_token, per_token
from roma_kernels.arguments import FLOATS, check_dtype, check_tensor
from roma_kernels.errors import fail

__all__ = ["BetaTracker", "Forgetting", "sampled_entropy", "shape_by_entropy", "whiten"]


@torch.no_grad()
def whiten(advantages: Tensor) -> Tensor:
    """Advantages in units of their deviation over the whole batch, less their mean.

        (A − mean)/√max(var, 1e-6),   var biased

    All equal, or a single one: exactly 0. Whitening may turn the sign of an A: it is against the
    batch that a rollout is then good or bad.

    Args:
        advantages: [B] fp32 or fp64, finite: of every rank, not of one or of a micro-batch.

    Returns:
        [B], same dtype, not differentiable.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape or dtype, or a number that is not finite.

    Example:
        >>> whiten(torch.tensor([1.0, 0.0, 1.0, 0.0]))
        tensor([ 1., -1.,  1., -1.])
    """
    check_per_sequence("advantages", advantages)
    if not len(advantages):
        return advantages.detach().clone()
    wide = advantages.detach().double()
    deviation = wide - wide.mean()
    found = deviation * deviation.square().mean().clamp(min=1e-6).rsqrt()
    # The mean of equal numbers can be off by a rounding.
    return found.where(wide.amin() < wide.amax(), 0.0).to(advantages.dtype)


@torch.no_grad()
def sampled_entropy(logp: Tensor) -> Tensor:
    """−p·log p of the sampled token, which the official code of MSSR takes for its entropy.

    It lies in [0, 1/e], costs nothing beyond logp, and is one term of the entropy's sum.

    Args:
        logp: [B, T], or any shape, in nats, ≤ 0; a rounding above 0 counts as 0. Padding may be
            anything.

    Returns:
        Same shape and dtype, not differentiable; NaN where logp is.

    Raises:
        TypeError: not a tensor.
        ValueError: no floating point.

    Example:
        >>> sampled_entropy(torch.tensor([[0.5, 1.0]]).log())
        tensor([[0.3466, 0.0000]])
    """
    check_tensor("logp", logp)
    check_dtype("logp", logp, FLOATS)
    wide = logp.double().clamp(max=0.0)
    return (wide.abs() * wide.exp()).masked_fill(wide == -math.inf, 0.0).to(logp.dtype)


@torch.no_grad()
def shape_by_entropy(
    advantages: Tensor, entropy: Tensor, mask: Tensor, *, coef: float = 0.4, divisor: float = 2.0
) -> Tensor:
    """Raises advantages where the policy is unsure (arXiv 2512.18215).

        Â_t = A_t + min(coef·H_t, |A_t|/divisor)

    A good rollout is rewarded more and a bad one punished less at tokens of high entropy. The sign
    of A stays, since what is added is less than |A|; of A = 0 it is 0.

    Args:
        advantages: [B] or [B, T], fp32 or fp64, whitened.
        entropy: [B, T] nats: `sampled_entropy(logp)`, as the official code has it, or the entropy
            of the whole distribution. A rounding below 0 counts as 0.
        mask: [B, T] bool, True = counts.
        coef: ≥ 0, per nat.
        divisor: > 1.

    Returns:
        [B, T], the dtype of `advantages`, 0 outside the mask, not differentiable.

    Raises:
        TypeError: not a tensor.
        ValueError: other shapes or dtypes, numbers that are not finite where the mask is True, a
            negative coef, a divisor of 1 or less.

    Example:
        >>> mask = torch.ones(2, 2, dtype=torch.bool)
        >>> shape_by_entropy(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 9.0]] * 2), mask)
        tensor([[ 1.0000,  1.5000],
                [-1.0000, -0.5000]])
    """
    if not 0 <= coef < math.inf:
        fail("coef", "a finite number ≥ 0", str(coef), "0.4 is the published one")
    if not 1 < divisor < math.inf:
        fail("divisor", "a finite number > 1", str(divisor), "2 is the published one")
    own = per_token(advantages, mask)
    check_per_token("entropy", entropy, mask)
    check_finite("entropy", entropy, mask)
    unsure = entropy.detach().double().where(mask, 0.0).clamp(min=0.0)
    return (own + torch.minimum(coef * unsure, own.abs() / divisor)).to(advantages.dtype)
