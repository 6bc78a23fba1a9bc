"""The simulated matrix unit, against exact fractions and by hand; the tables that it prints."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import data
from experiments.accumulator import __main__ as program
from experiments.accumulator import measure
from experiments.accumulator.simulate import multiply
from roma.testing.matrix_unit import AMPERE, HOPPER, MatrixUnit

VOLTA = MatrixUnit(terms=4, guard=0)
MATH = Path(__file__).parents[2] / "docs" / "MATH.md"


def exponent(x: Fraction) -> int:
    """⌊log2 |x|⌋."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def cut(x: Fraction, place: int) -> Fraction:
    """Towards zero to a multiple of 2^place."""
    return math.trunc(x / Fraction(2) ** place) * Fraction(2) ** place


def by_fractions(left: list[float], right: list[float], unit: MatrixUnit, start: float) -> Fraction:
    """One entry, from the description in simulate.py."""
    total = Fraction(start)
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(left, right, strict=True)]
    for first in range(0, len(pairs), unit.terms):
        block = pairs[first : first + unit.terms]
        exponents = [exponent(a) + exponent(b) for a, b in block if a and b]
        exponents += [exponent(total)] if total else []
        if exponents:
            place = max(exponents) - 23 - unit.guard
            total = cut(total, place) + sum(cut(a * b, place) for a, b in block)
        total = cut(total, exponent(total) - 23) if total else total
    return total


def spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers over a dozen powers of two, and zeros."""
    powers = torch.randint(-6, 7, shape, generator=generator)
    numbers = torch.randn(shape, generator=generator) * 2.0**powers
    return numbers.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", [HOPPER, AMPERE, VOLTA], ids=["Hopper", "Ampere", "Volta"])
@pytest.mark.parametrize("depth", [1, 16, 40])
def test_every_bit(depth: int, unit: MatrixUnit, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(depth)
    left, right = (spread((6, depth), dtype, generator) for _ in range(2))
    start = spread((6, 6), torch.float32, generator) * 8
    got = multiply(left, right, unit, start=start)
    for i, j in itertools.product(range(6), range(6)):
        want = by_fractions(left[i].tolist(), right[j].tolist(), unit, start[i, j].item())
        assert Fraction(got[i, j].item()) == want


def one(products: list[float], unit: MatrixUnit, start: float = 2.0**24, **how: bool) -> float:
    """start + Σ products − 2²⁴."""
    left, right = torch.tensor([products]), torch.ones(1, len(products))
    return multiply(left, right, unit, start=torch.tensor([[start]]), **how).item() - 2**24


def test_by_hand() -> None:
    """2²⁴ has places of 2: with two guard bits a product keeps its halves, with one its ones."""
    assert one([0.5] * 4, HOPPER) == 2 and one([0.5] * 4, AMPERE) == 0
    assert one([0.25] * 8, HOPPER) == 0
    assert one([1.0] * 2, AMPERE) == 2 and one([1.0] * 2, VOLTA) == 0
    # Two terms more are another block on one chip alone.
    assert one([0.5] * 18, HOPPER) == 8 and one([1.0] * 9, AMPERE) == 8
    # Cut off at last, not rounded; and towards zero on both sides.
    assert one([1.0] * 3, HOPPER) == 2 and one([1.0] * 3, HOPPER, nearest=True) == 4
    assert one([-1.0], HOPPER) == -1
    assert one([0.5], HOPPER, start=-(2.0**24)) == 1 - 2**25
    # 1.5·1.5 counts as 2⁰, the sum of its exponents, though it is more than 2.
    left, right = torch.tensor([[1.5, *[2.0**-25] * 8]]), torch.tensor([[1.5, *[1.0] * 8]])
    assert multiply(left, right, HOPPER).item() == 2.25 + 2.0**-22


def test_a_promoted_sum() -> None:
    """Each part begins at 0, so it keeps bits that the whole sum had lost."""
    left, right = torch.tensor([[2.0**24, *[0.0] * 15, *[0.25] * 16]]), torch.ones(1, 32)
    assert multiply(left, right, HOPPER).item() == 2**24
    assert multiply(left, right, HOPPER, promote=16).item() == 2**24 + 4


def test_a_block_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"terms·2\^guard ≤ 64"):
        multiply(torch.ones(1, 1), torch.ones(1, 1), MatrixUnit(terms=32, guard=2))


@pytest.fixture(scope="module")
def case() -> data.Case:
    return data.make(data.Shape(tokens=12, views=2, depth=256, vocab=900), "cpu")


def test_sampled_logits_stand_for_all(case: data.Case) -> None:
    """The mean over 128 of the tail is off by at most 4/√128 of what the tail contributes."""
    products = {"sampled": measure.of(HOPPER), "whole": measure.of(HOPPER)}
    rows = measure.measure(case, products, whole=("whole",))
    sampled, whole = rows["sampled"], rows["whole"]
    for name in ("logp_rms", "logp_max", "delta_rms"):
        assert getattr(sampled, name) == pytest.approx(getattr(whole, name), rel=4 / 128**0.5)
    assert sampled.worst_view == whole.worst_view


def test_exact_products_have_no_error(case: data.Case) -> None:
    rows = measure.measure(case, {"exact": lambda h, w: h.double() @ w.double().mT})
    assert rows["exact"].logp_max < 1e-12 and rows["exact"].worst_view == 1


def test_the_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables; rounding to bf16 is far worse than any unit; a unit of one's own."""
    sizes = "--tokens 8 --views 2 --depth 256 --vocab 300 --terms 4".split()
    monkeypatch.setattr("sys.argv", ["accumulator", *sizes])
    program.main()
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \|", said, re.M)
    rows = [row for row in rows if row[1][0].isdigit()]
    names = [program.BF16, *measure.PRODUCTS, "4 terms, 0 guard bits"]
    assert [row[0] for row in rows] == names * 2
    for table in (rows[: len(names)], rows[len(names) :]):
        rounded, *others = (float(row[1]) for row in table)
        assert rounded > 100 * max(others)


def test_the_documentation_quotes_every_row() -> None:
    section = MATH.read_text().split("## 7.")[1]
    assert "python -m experiments.accumulator --full" in section
    for name in (program.BF16, *measure.PRODUCTS):
        assert section.count(f"| {name} |") == 2, name
