"""A product as a matrix unit computes it, bit by bit.

For each block of `terms` products p_i and the running sum c, with F = 23 + guard:

    e = the largest exponent of c and of the p_i, where a product's is the sum of its factors'
    c ← fp32( Σ_i cut(p_i) + cut(c) )          cut: towards zero, to a multiple of 2^(e − F)

The sum is exact, and fp32() cuts off too. Khattak and Mikaitis (arXiv 2512.07004) publish inputs
and results of such blocks from A100, A2, L40S, Ada, H100, H200 and B200, 5,000 a chip for bf16 and
for fp16: `multiply` gives all 70,000 bit by bit.
"""

import torch
from torch import Tensor

from roma.testing.matrix_unit import MatrixUnit, power_of_two

_BELOW_FP32 = (1 << 29) - 1  # bits of a float64's fraction that fp32 has not


def multiply(
    left: Tensor,
    right: Tensor,
    unit: MatrixUnit,
    *,
    start: Tensor | None = None,
    nearest: bool = False,
    promote: int | None = None,
) -> Tensor:
    """left·rightᵀ, [..., R, V] fp32, for left [..., R, D] and right [..., V, D].

    Args:
        left: bf16 or fp16, as is `right`, or such numbers in a wider dtype; their sizes 0 or
            between 2⁻⁴⁰ and 2⁴⁰, so that fp32 holds every product.
        right: leading dimensions are those of `left`.
        unit: how it adds.
        start: [..., R, V], the sum to begin with; None: 0.
        nearest: the sum is rounded to nearest at last, where a matrix unit cuts it off.
        promote: after so many terms the sum is added to another, rounded to nearest, and begins
            again at 0; None: never.

    Raises:
        ValueError: a block of the unit may need more than 32 bits.

    Example:
        >>> three = torch.tensor([[2.0**24, 1.0, 1.0]]), torch.ones(1, 3)
        >>> [multiply(*three, MatrixUnit(3, guard)).item() - 2**24 for guard in (0, 1)]
        [0.0, 2.0]
    """
    if unit.terms << unit.guard > 64:
        raise ValueError(f"{unit}: expected terms·2^guard ≤ 64, so that a block fits 32 bits")
    left, right = left.float(), right.float()
    total = left.new_zeros(*left.shape[:-1], right.shape[-2]) if start is None else start.float()
    if promote is None:
        return _chain(left, right, unit, total, nearest=nearest)
    for h, w in zip(left.split(promote, -1), right.split(promote, -1), strict=True):
        total = total + _chain(h, w, unit, torch.zeros_like(total), nearest=nearest)
    return total


def _chain(
    left: Tensor, right: Tensor, unit: MatrixUnit, total: Tensor, *, nearest: bool
) -> Tensor:
    # By term first, so that one term of all rows lies together.
    rows, columns = left.movedim(-1, 0)[..., None], right.movedim(-1, 0)[..., None, :]
    rows, columns = rows.contiguous(), columns.contiguous()
    sizes = tuple(power_of_two(x.double()).float() for x in (rows, columns))
    product, largest = torch.empty_like(total), torch.empty_like(total)
    whole, whole_sum = (torch.empty_like(total, dtype=torch.int32) for _ in range(2))
    for first in range(0, len(rows), unit.terms):
        block = range(first, min(first + unit.terms, len(rows)))
        largest.copy_(power_of_two(total.double()))
        for i in block:
            torch.mul(sizes[0][i], sizes[1][i], out=product)
            torch.maximum(largest, product, out=largest)
        # A block of zeros has none: any will do.
        places = 2.0 ** (23 + unit.guard) / largest.clamp_(min=2.0**-90)
        whole_sum.zero_()
        for i in block:
            torch.mul(rows[i], columns[i], out=product)
            whole_sum += whole.copy_(product.mul_(places))  # to whole numbers, towards zero
        exact = whole_sum.double() + (total * places).int()
        total = (exact if nearest else _cut(exact)).float() / places
    return total


def _cut(x: Tensor) -> Tensor:
    """Towards zero to fp32."""
    return (x.view(torch.int64) & ~_BELOW_FP32).view(torch.float64)
