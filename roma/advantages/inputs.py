"""Checks that the refinements of advantages share: one line names what is wrong, and the remedy."""

import torch
from torch import Tensor

from roma_kernels.arguments import FLOATS, check_dtype, check_shape, check_tensor, check_values
from roma_kernels.errors import fail

REAL = (torch.float32, torch.float64)


def check_per_sequence(name: str, value: Tensor) -> None:
    """Checks that `value` is [B], fp32 or fp64, finite."""
    check_tensor(name, value)
    check_dtype(name, value, REAL)
    if value.ndim != 1:
        fail(name, "[B]", str(list(value.shape)), "give one number for each sequence")
    check_finite(name, value, torch.ones_like(value, dtype=torch.bool))


def check_mask(mask: Tensor) -> None:
    """Checks that `mask` is [B, T] bool."""
    check_tensor("mask", mask)
    check_dtype("mask", mask, (torch.bool,))
    if mask.ndim != 2:
        fail("mask", "[B, T]", str(list(mask.shape)), "give a row for each sequence")


def check_per_token(name: str, value: Tensor, mask: Tensor) -> None:
    """Checks that `value` is [B, T], floating point, on the device of the mask; no values."""
    check_tensor(name, value, like=mask)
    check_dtype(name, value, FLOATS)
    check_shape(name, value, ("[B, T]", tuple(mask.shape)))


def check_finite(name: str, value: Tensor, counts: Tensor) -> None:
    """Checks that `value` is finite wherever `counts`, of the same shape, is True."""
    ok = value.isfinite() | ~counts
    check_values(
        ok,
        lambda: (
            f"{name}: expected finite numbers, got {value[~ok][0]} "
            f"at index {(~ok).nonzero()[0].tolist()}; look at what computed it"
        ),
    )


def check_group(group: Tensor, mask: Tensor) -> None:
    """Checks that `group` is [B] int64, on the device of the mask."""
    check_tensor("group", group, like=mask)
    check_dtype("group", group, (torch.int64,))
    check_shape("group", group, ("[B]", (mask.shape[0],)))


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as [B, T] float64, 0 outside the mask, no gradient.

    Raises:
        TypeError: not a tensor.
        ValueError: a mask that is not [B, T] bool; advantages of another shape or dtype, or not
            finite where the mask is True.
    """
    check_mask(mask)
    check_tensor("advantages", advantages, like=mask)
    check_dtype("advantages", advantages, REAL)
    rows = ("[B]", (mask.shape[0],))
    check_shape("advantages", advantages, rows, ("[B, T]", tuple(mask.shape)))
    wide = advantages.detach().double()
    if wide.ndim == 1:
        check_finite("advantages", wide, torch.ones_like(wide, dtype=torch.bool))
        return wide[:, None].where(mask, 0.0)
    check_finite("advantages", wide, mask)
    return wide.where(mask, 0.0)
