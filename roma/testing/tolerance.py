"""The tolerance rule of the tests, and the only place that holds numbers.

Each number has its derivation beside it.

Three numbers stand behind every comparison: got (the kernel), want (the oracle, float64) and eager
(plain PyTorch, the oracle's lines in float32 on the same inputs). With noise the first-order
rounding error that any honest float32 kernel makes, element by element,

    largest = 2·max|eager - want| + 2·eps(dtype)·max|want| + SIGMAS·max(noise) + spacing at zero
    mean    = 2·mean|eager - want| + 2·eps(dtype)·mean|want| + SIGMAS·mean(noise) + the same spacing

and both the largest and the mean error must stay within. The mean catches the small wrong thing
that is everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from roma.testing.matrix_unit import MatrixUnit, power_of_two
from roma_kernels.linear_logprob.reference import HeadReference

# Noise below is one standard deviation of a sum of independent rounding errors. Among 10^4 normal
# draws the largest is near 4 of them; a sum of n ≤ 400 terms in sequence is off by up to 0.2·√n ≤ 4
# times eps·√(Σ terms²).
SIGMAS = 4.0

# Rounding once to nearest is uniform on ±eps/2, so its standard deviation is eps/√12.
ROUND_ONCE = 1 / math.sqrt(12)

# A comparison of gradients asks that no log-ratio lies nearer to a kink than this many standard
# deviations of its own rounding error (else either branch is right); 10 normal deviations never
# happen.
KINK_SIGMAS = 10.0

# A planted error of this many bounds must be refused (STYLE, rule 12).
PLANTED = 10.0

# A difference of log-probs, its exponential, two products and a sum of at most a dozen terms: fewer
# than 16 roundings.
FEW = 16.0

# The soft-max of D = 8 by V = 33 and a product with its gradient: D + V + FEW roundings, rounded up
# to 64.
MANY = 64.0

# A bound is worth having only if it is a small share of the signal: beyond these shares of
# max|want| on plain data a comparison proves little. float32: D, V ≤ 257, so 4·eps32·√257·(a few) <
# 1e-4. bfloat16: 2·eps = 1.6 %, plus dlogits rounded once to bfloat16 (4·eps/√12 = 0.9 % of √(Σ
# terms²), which may be twice the sum's size).
SHARE = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def eps(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of dtype."""
    return torch.finfo(dtype).eps


def few(size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor | float:
    """Error of a short chain of operations on numbers up to size."""
    return FEW * eps(dtype) * size


def many(size: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor | float:
    """Error of a small head and its gradient, from numbers up to size."""
    return MANY * eps(dtype) * size


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and logits are kept in.

    Float32, or float64 for the reference on float64 inputs.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Bound:
    """The largest and the mean absolute error that a correct result may have."""

    largest: float
    mean: float


def bound(want: Tensor, eager: Tensor, dtype: torch.dtype, noise: Tensor | float = 0.0) -> Bound:
    """The rule at the head of this file.

    Noise: standard deviation of the rounding error, a number or like want.
    """
    if want.numel() == 0:
        return Bound(0.0, 0.0)
    want, eager = want.detach().double(), eager.detach().double()
    noise = torch.as_tensor(noise, dtype=torch.float64).detach()
    spacing = torch.finfo(dtype).smallest_normal * eps(dtype)
    off = (eager - want).abs()
    largest = 2 * off.max() + 2 * eps(dtype) * want.abs().max() + SIGMAS * noise.max()
    mean = 2 * off.mean() + 2 * eps(dtype) * want.abs().mean() + SIGMAS * noise.mean()
    return Bound(float(largest) + spacing, float(mean) + spacing)


def check(
    name: str,
    got: Tensor | None,
    want: Tensor,
    eager: Tensor,
    *,
    dtype: torch.dtype,
    noise: Tensor | float = 0.0,
) -> Bound:
    """Assert shape, dtype, finiteness and both errors; returns the bound that was applied."""
    assert got is not None, f"{name}: expected a tensor, got None"
    assert got.shape == want.shape, (
        f"{name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
    )
    assert got.dtype == dtype, f"{name}: expected {dtype}, got {got.dtype}"
    limit = bound(want, eager, dtype, noise)
    if got.numel() == 0:
        return limit
    error = (got.detach().double() - want.detach().double()).abs()
    largest, mean = float(error.max()), float(error.mean())
    # Written with "not <=" so that a NaN fails.
    if not largest <= limit.largest:
        raise AssertionError(
            f"{name}: largest error {largest:.3e} exceeds {limit.largest:.3e} "
            f"(max|want| {float(want.detach().abs().max()):.3e}, "
            f"at {int(error.argmax())} of {error.numel()})"
        )
    if not mean <= limit.mean:
        raise AssertionError(f"{name}: mean error {mean:.3e} exceeds {limit.mean:.3e}")
    return limit


def refuses(name: str, got: Tensor, want: Tensor, eager: Tensor, **how) -> bool:
    """Whether `check` refuses got."""
    try:
        check(name, got, want, eager, **how)
    except AssertionError:
        return True
    return False


class ProductError(NamedTuple):
    """How far sums of products are off: on average, with its sign, and a deviation about that."""

    offset: Tensor
    spread: Tensor

    @property
    def noise(self) -> Tensor:
        """Both as one standard deviation: `check` admits SIGMAS of those."""
        return self.offset.abs() / SIGMAS + self.spread

    def less(self, other: ProductError) -> ProductError:
        """Of the difference of two sums, whose last bits are independent."""
        spread = (self.spread**2 + other.spread**2).sqrt()
        return ProductError(self.offset - other.offset, spread)


def product_error(left: Tensor, right: Tensor, unit: MatrixUnit | None) -> ProductError:
    """How far left·rightᵀ, [R, V], is off, for left [R, D] and right [V, D].

    A sum of D products, each rounded to nearest: by eps·√(Σ (h w)²). A matrix unit cuts off. With
    `place(x)` the last place of an fp32 number of the size of x, each block of terms loses up to

        place(sum)                      when its sum becomes an fp32 number
        place(largest)·2^-guard         of each product, and of the sum so far if that has finer
                                        places; the largest of them all

    Half of it is expected, with the sign of what is cut, and a deviation of 1/√12. `largest` comes
    from the block's largest |h| and largest |w|, which may belong to different terms: no smaller
    than the truth, and in a long sum the sum itself is the largest.
    """
    fp32 = eps(torch.float32)
    cuts = unit if unit is not None and unit.multiplies(left, right) else None
    step = eps(accumulator(torch.promote_types(left.dtype, right.dtype)))
    left, right = left.detach().double(), right.detach().double()
    total = left.new_zeros(len(left), len(right))
    if cuts is None:
        return ProductError(total, step * (left**2 @ right.T**2).sqrt())
    offset, variance = torch.zeros_like(total), torch.zeros_like(total)
    for h, w in zip(left.split(cuts.terms, 1), right.split(cuts.terms, 1), strict=True):
        own = power_of_two(total) * fp32
        product = power_of_two(h).amax(1)[:, None] * power_of_two(w).amax(1) * fp32
        shared = torch.maximum(own, product) * 2.0**-cuts.guard
        late = torch.where(shared > own, shared, 0.0)
        offset -= (shared * (h.sign() @ w.sign().T) + late * total.sign()) / 2
        total += h @ w.T
        last = power_of_two(total) * fp32
        offset -= last * total.sign() / 2
        variance += last**2 + h.shape[1] * shared**2 + late**2
    return ProductError(offset, variance.sqrt() * ROUND_ONCE)


def logp_error(logits: ProductError, out: HeadReference, tokens: Tensor) -> ProductError:
    """How far log-probs [R] are off: as logit y, less as all logits, weighed by p.

    For τ = 1 without a softcap. The logits are off independently of one another, but for the
    offset. z_y, lse and each z of the mean are rounded once at their own size, in fp32.
    """
    z, p = out.z.detach().double(), out.p.detach().double()
    share = -p
    share.scatter_add_(1, tokens[:, None], torch.ones_like(share[:, :1]))
    target = z.gather(1, tokens[:, None])[:, 0]
    rounded = target**2 + out.lse.detach().double() ** 2 + (p**2 * z**2).sum(1)
    variance = (share**2 * logits.spread**2).sum(1) + (
        eps(torch.float32) * ROUND_ONCE
    ) ** 2 * rounded
    return ProductError((share * logits.offset).sum(1), variance.sqrt())


def logp_noise(
    out: HeadReference,
    hidden: Tensor,
    weight: Tensor,
    scale: Tensor | float,
    dtype: torch.dtype,
    unit: MatrixUnit | None = None,
) -> Tensor:
    """Rounding error of logp (and of lse) per row [R].

    A logit is a sum of D products, scaled by 1/τ (scale); z_y and lse are each rounded at their own
    size, and so is every sum inside Σ p·z.
    """
    product = product_error(hidden, weight, unit).noise.amax(dim=1) * scale
    largest = out.z.detach().double().abs().amax(dim=1) + out.lse.detach().double().abs()
    return product + eps(accumulator(dtype)) * largest


@dataclass(frozen=True)
class DLogits:
    """The gradient by the bare product, [R, V], with two kinds of rounding error.

    alone: independent from entry to entry. together: from one row's lse, upstream and slope, hence
    of one sign.
    """

    value: Tensor
    alone: Tensor
    together: Tensor


def dlogits(
    out: HeadReference,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | float,
    dlogp_noise: Tensor | float,
    noise: Tensor,
    *,
    scale: Tensor | float,
    softcap: float | None,
    dtype: torch.dtype,
) -> DLogits:
    """The gradient by the bare product and its rounding errors, for upstreams dlogp, dentropy [R].

    noise [R] is the error of logp, hence the relative error of every probability; dlogp_noise that
    of the upstream. The slope of 1/τ and softcap is off by eps, and by 2·noise/s through 1 -
    (z/s)². Inputs below float32 may have their dlogits rounded once to that dtype before the two
    products (DESIGN, "The kernels").
    """

    def by_row(x: Tensor | float) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64).detach().expand(len(tokens))[:, None]

    p, z = out.p.detach().double(), out.z.detach().double()
    column = torch.zeros_like(p).scatter_(1, tokens[:, None], 1.0)
    g, e, n, per_row = by_row(dlogp), by_row(dentropy), by_row(noise), by_row(scale)
    shift = z - by_row(out.lse) + by_row(out.entropy)
    capped = torch.ones_like(z) if softcap is None else 1 - (z / per_row / softcap) ** 2
    slope = capped * per_row
    unit = eps(accumulator(dtype))
    slope_noise = unit * per_row + (0.0 if softcap is None else 2 * n / softcap)
    size = g.abs() * (column + p) + e.abs() * p * shift.abs()
    together = by_row(dlogp_noise) * (column + p) + p * n * (g.abs() + e.abs() * (1 + shift.abs()))
    once = eps(dtype) * ROUND_ONCE if accumulator(dtype) != dtype else 0.0
    value = (g * (column - p) - e * p * shift) * slope
    return DLogits(
        value=value,
        alone=(once + unit) * value.abs() + unit * g.abs() * column * slope,
        together=together * slope + size * slope_noise,
    )


def dhidden_noise(dz: DLogits, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding error of dh = dz W, [R, D].

    The errors of one row's lse and upstream add up over the vocabulary.
    """
    right = weight.detach().double()
    spread = dz.alone**2 + (eps(accumulator(dtype)) * dz.value) ** 2
    return (spread @ right**2).sqrt() + dz.together @ right.abs()


def dweight_noise(dz: DLogits, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding error of dW = dzᵀ h, [V, D]: rows err independently.

    With hidden = 1 [R, 1] it is that of db.
    """
    spread = (dz.alone + dz.together) ** 2 + (eps(accumulator(dtype)) * dz.value) ** 2
    return (spread.T @ hidden.detach().double() ** 2).sqrt()


def scalar_noise(terms: Tensor, slopes: list[Tensor], noise: float) -> float:
    """Rounding error of a sum of token terms whose log-ratios are off by noise.

    Slopes are its gradients by them.

    The last term is of second order: at δ = 0 the slope of k3 vanishes and its error is noise²/2,
    weighed by λ ≤ 3.
    """
    slope = math.sqrt(sum(float((g.double() ** 2).sum()) for g in slopes))
    unit = eps(torch.float32)
    return unit * (float(terms.detach().double().norm()) + slope) + noise * slope + noise**2
