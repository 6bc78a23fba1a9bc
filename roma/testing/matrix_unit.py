"""How a GPU's matrix units add: what the bounds of `tolerance` and experiments/accumulator know.

No vendor documents it. Fasi, Higham, Mikaitis and Pranesh (2021, doi 10.7717/peerj-cs.330) measured
the first two generations; Khattak and Mikaitis (arXiv 2512.07004) and Xie et al. (arXiv 2511.10909)
the later ones, with models that are equal to the hardware bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixUnit:
    """Products of bf16 or fp16 numbers with an fp32 sum.

    `terms` exact products and the running sum are aligned to the largest exponent among them (a
    product's is the sum of its factors'), each is cut off `guard` bits below the last place of an
    fp32 number with that exponent, they are added without error, and the sum is cut off to fp32.
    Cutting off is towards zero: it takes half a place on average, always of the same sign.
    """

    terms: int
    guard: int

    def multiplies(self, left: Tensor, right: Tensor) -> bool:
        """Whether a product of the two is its work; fp32 numbers are multiplied elsewhere."""
        return left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)


AMPERE = MatrixUnit(terms=8, guard=1)
"""Capability 8.x. AMD's CDNA 3 too, but for the direction in which it cuts; CDNA 1 and 2 round."""

HOPPER = MatrixUnit(terms=16, guard=2)
"""Capability 9.0, and Blackwell's (10.x and 12.x)."""


def matrix_unit(device: torch.device | str) -> MatrixUnit | None:
    """The matrix unit of a device; None for a CPU, whose sums are rounded to nearest."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    newer = not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)
    return HOPPER if newer else AMPERE


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most |x|, for float64 numbers; 0 for 0.

    Example:
        >>> power_of_two(torch.tensor([0.0, 1.5, -9.0], dtype=torch.float64)).tolist()
        [0.0, 1.0, 8.0]
    """
    exponent = 0x7FF << 52  # the bits of a float64 that are neither sign nor fraction
    return (x.view(torch.int64) & exponent).view(torch.float64)
