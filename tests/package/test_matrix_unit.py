"""Bounds for sums that a matrix unit cuts off, against a simulation: they fit, and they bite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.simulated_card import Card
from torch import Tensor

from experiments.accumulator.simulate import multiply
from roma.testing import backends, check_backend, compare_head, tolerance
from roma.testing.compare_views import check_views
from roma.testing.matrix_unit import AMPERE, HOPPER, MatrixUnit, matrix_unit
from roma.testing.strategies import HeadSpec

UNITS = pytest.mark.parametrize("unit", [HOPPER, AMPERE], ids=["Hopper", "Ampere"])
D, V, K, N = 4096, 1000, 3, 12


def draw(dtype: torch.dtype = torch.bfloat16, depth: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """States [K+1, N, D] whose logits have standard deviation 5.3, a head, random tokens."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    clean = normal(N, depth) * (5.3 / depth**0.5)
    views = [clean * (1 + 0.01 * normal(N, depth)) for _ in range(K)]
    tokens = torch.randint(V, (N,), generator=generator)
    return torch.stack([clean, *views]).to(dtype), normal(V, depth).to(dtype), tokens


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    target = logits.gather(1, tokens.repeat(K + 1)[:, None])[:, 0]
    return (target - logits.logsumexp(1)).view(K + 1, N)


@UNITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [8, 33, 200, 1024])
def test_the_expected_loss_of_a_logit(unit: MatrixUnit, dtype: torch.dtype, depth: int) -> None:
    """Every logit's error is within SIGMAS deviations, and uses a good part of them."""
    states, weight, _ = draw(dtype, depth)
    rows = states.flatten(0, 1)
    off = multiply(rows, weight, unit).double() - rows.double() @ weight.double().T
    room = tolerance.SIGMAS * tolerance.product_error(rows, weight, unit).noise
    used = (off.abs() / room).max()
    assert 0.25 < float(used) <= 1


@UNITS
def test_a_unit_passes_its_own_bound_and_not_that_of_rounding(unit: MatrixUnit) -> None:
    states, weight, tokens = draw()
    got = log_probs(multiply(states.flatten(0, 1), weight, unit), tokens)
    check_views(got, states, weight, tokens, unit)
    with pytest.raises(AssertionError, match=r"^logp: largest error"):
        check_views(got, states, weight, tokens, None)


def test_planted_errors_are_refused() -> None:
    """Of ten bounds, of bf16 logits, and of views alone where log-probs would still pass."""
    states, weight, tokens = draw()
    logits = multiply(states.flatten(0, 1), weight, HOPPER)
    got = log_probs(logits, tokens)
    check = partial(check_views, states=states, weight=weight, tokens=tokens, unit=HOPPER)
    of_logp, of_delta = check(got)
    assert of_delta.largest < of_logp.largest / 2
    one = torch.zeros_like(got)
    one[0, 3] = tolerance.PLANTED * of_logp.largest
    everywhere = torch.full_like(got, tolerance.PLANTED * of_logp.mean)
    for wrong in (got + one, got - one, got + everywhere, got - everywhere):
        with pytest.raises(AssertionError, match=r"^logp: "):
            check(wrong)
    with pytest.raises(AssertionError, match=r"^logp: "):
        check(log_probs(logits.bfloat16().float(), tokens))
    apart = torch.full_like(got, of_delta.largest)
    apart[0] *= -1
    for wrong in (got + apart, got - apart):
        with pytest.raises(AssertionError, match=r"^view_logp - logp: "):
            check(wrong)
    check(got - 0.25 * of_logp.largest)  # the same on all images of a token


PUBLIC = ("linear_logprob", "roma_loss")


def on_card(monkeypatch: pytest.MonkeyPatch, unit: MatrixUnit, **how: Any) -> Card:
    """A card whose unit `check_backend` takes for the CPU's."""
    monkeypatch.setattr(backends, "matrix_unit", lambda device: unit)
    return Card(unit, **how)


@UNITS
@pytest.mark.parametrize("op", PUBLIC)
def test_a_simulated_card_passes(op: Any, unit: MatrixUnit, monkeypatch: Any) -> None:
    card = on_card(monkeypatch, unit)
    check_backend(getattr(card, op), op=op, examples=40, dtypes=[torch.bfloat16, torch.float16])


def padded_lane(logits: Tensor) -> Tensor:
    """A tail that counts as e⁰."""
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)


def slightly_scaled(logits: Tensor) -> Tensor:
    return logits * (1 - 2.0**-16)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("op", PUBLIC)
@pytest.mark.parametrize(
    "spoil", [torch.Tensor.bfloat16, padded_lane, slightly_scaled], ids=lambda f: f.__name__
)
def test_a_wrong_card_is_refused(
    op: Any, spoil: Callable[[Tensor], Tensor], monkeypatch: Any
) -> None:
    card = on_card(monkeypatch, HOPPER, spoil=lambda z: spoil(z).float())
    with pytest.raises(AssertionError, match="exceeds"):
        check_backend(getattr(card, op), op=op, examples=40, dtypes=[torch.bfloat16])


@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, torch.float16)])
def test_products_that_are_not_its_work(dtypes: Any, monkeypatch: Any) -> None:
    """fp32, or two dtypes, are multiplied in fp32: a bound for rounding."""
    spec = HeadSpec(d=64, dtype=dtypes[0], weight_dtype=dtypes[1])
    inputs = spec.make()
    compare_head.check_against_oracle(spec, "torch", unit=HOPPER)
    pair = inputs["hidden"].reshape(-1, 64), inputs["weight"]
    with_unit, without = (tolerance.product_error(*pair, unit) for unit in (HOPPER, None))
    assert torch.equal(with_unit.spread, without.spread) and not with_unit.offset.any()


def test_the_unit_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix_unit("cpu") is None
    for capability, unit in {
        (8, 0): AMPERE,
        (8, 9): AMPERE,
        (9, 0): HOPPER,
        (12, 0): HOPPER,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert matrix_unit("cuda:1") == unit
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert matrix_unit("cuda") == AMPERE
