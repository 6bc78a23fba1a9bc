"""Advantages from the rewards of a prompt's rollouts (MATH.md section 3), computed in float64."""

import torch
from torch import Tensor

from roma_kernels.arguments import check_dtype, check_shape, check_tensor, check_values
from roma_kernels.errors import fail


def grpo(rewards: Tensor, group: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Rewards relative to their group's mean, in units of its standard deviation.

        A = (r − mean_g) / (std_g + ε),   std unbiased

    (arXiv 2402.03300; unbiased as in TRL and EasyR1.) A group of one, or of equal rewards, gets
    exactly 0.

    Args:
        rewards: [B] fp32 or fp64, finite; of sequences in any order.
        group: [B] int64, the prompt of each sequence, any ids.
        eps: ε > 0, in units of the reward.

    Returns:
        [B], the dtype of `rewards`, not differentiable. Nothing is reduced over B.

    Raises:
        TypeError: not a tensor.
        ValueError: a wrong dtype or shape, a reward that is not finite, or eps ≤ 0.

    Example:
        >>> grpo(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 7, 9, 9]))
        tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    if eps <= 0:
        fail("eps", "a positive number", str(eps), "1e-6 is usual")
    deviation, member, size = _centre(rewards, group)
    variance = _group_sum(deviation.square(), member, len(size)) / (size - 1).clamp(min=1)
    return (deviation / (variance.sqrt() + eps)[member]).to(rewards.dtype)


def dr_grpo(rewards: Tensor, group: Tensor) -> Tensor:
    """Rewards relative to their group's mean: A = r − mean_g (arXiv 2503.20783).

    Arguments, result and errors as those of `grpo`.

    Example:
        >>> dr_grpo(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
        tensor([ 0.5000, -0.5000])
    """
    return _centre(rewards, group)[0].to(rewards.dtype)


def rloo(rewards: Tensor, group: Tensor) -> Tensor:
    """Rewards relative to the mean of the other rewards of their group (leave one out).

        A = r − mean_others = G/(G − 1)·(r − mean_g)

    (arXiv 2402.14740.)

    Arguments, result and errors as those of `grpo`; a group of one is a ValueError, since
    there are no others.

    Example:
        >>> rloo(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]))
        tensor([ 1., -1.])
    """
    deviation, member, size = _centre(rewards, group)
    alone = size[member] == 1
    check_values(
        ~alone,
        lambda: (
            f"group: expected at least 2 sequences per group, got 1 in group {group[alone][0]}; "
            "roll out more often, or use grpo"
        ),
    )
    others = (size - 1).clamp(min=1).double()  # integers would divide to fp32
    return (deviation * (size / others)[member]).to(rewards.dtype)


def _centre(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns r − mean_g [B] float64, the index of each reward's group [B], and group sizes [P].

    The difference is exactly 0 where a group's rewards are equal.
    """
    check_tensor("rewards", rewards)
    check_tensor("group", group, like=rewards)
    check_dtype("rewards", rewards, (torch.float32, torch.float64))
    check_dtype("group", group, (torch.int64,))
    if rewards.ndim != 1:
        fail("rewards", "[B]", str(list(rewards.shape)), "flatten it, and group with it")
    check_shape("group", group, ("[B]", tuple(rewards.shape)))
    finite = rewards.isfinite()
    check_values(
        finite,
        lambda: (
            f"rewards: expected finite numbers, got {rewards[~finite][0]} "
            f"at index {int((~finite).nonzero()[0])}; look at the reward function"
        ),
    )
    ids, member, size = group.unique(return_inverse=True, return_counts=True)
    r = rewards.detach().double()
    deviation = r - (_group_sum(r, member, len(ids)) / size)[member]
    # The mean of equal numbers can be off by a rounding, which GRPO would divide by one as small.
    low = r.new_zeros(len(ids)).scatter_reduce(0, member, r, "amin", include_self=False)
    high = r.new_zeros(len(ids)).scatter_reduce(0, member, r, "amax", include_self=False)
    return deviation.where((low < high)[member], 0.0), member, size


def _group_sum(values: Tensor, member: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add(0, member, values)
