"""Sums and gradients of a head, as a card's matrix units and its vendor's library leave them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import card
from torch import Tensor

import roma
from experiments.accumulator.simulate import multiply
from roma import RomaConfig
from roma.testing import compare_head, compare_whole, tolerance
from roma.testing.compare_views import check_views
from roma.testing.matrix_unit import matrix_unit
from roma.testing.strategies import HeadSpec

FULL = {"views": 4, "sequences": 2, "length": 32, "depth": 4096, "vocab": 151_936}
SMALL = {"views": 2, "sequences": 2, "length": 4, "depth": 96, "vocab": 1500}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_card_adds_as_the_bounds_say(dtype: torch.dtype) -> None:
    """One block of products, over a dozen powers of two, in the vendor's product: bit by bit."""
    unit = matrix_unit("cuda")
    assert unit is not None
    if torch.version.hip:
        pytest.skip("AMD's units cut off in another direction; the bounds take their size alone")
    generator = torch.Generator().manual_seed(0)
    shape = (256, unit.terms)
    powers = [2.0 ** torch.randint(-6, 7, shape, generator=generator) for _ in range(2)]
    left, right = ((torch.randn(shape, generator=generator) * x).to(dtype) for x in powers)
    got = torch.mm(left.cuda(), right.cuda().T, out_dtype=torch.float32)
    assert torch.equal(got.cpu(), multiply(left, right, unit))


def check_rows(name: str, got: Tensor, want: Tensor, size: Tensor) -> None:
    """Each row of a gradient, and all: size is Σ |dz|·‖the other factor‖ of a row.

    Every dz was rounded to bf16, and the result once more, each by at most 2⁻⁸ of itself.
    """
    off = (got.double() - want).norm(dim=1)
    assert bool((off <= 2 * 2**-8 * size).all()), f"{name}, row {int((off / size).argmax())}"
    assert float(off.norm() / want.norm()) <= 2 * 2**-8, name


def check_gradients(case: dict[str, Any], g: Tensor, got: list[Tensor]) -> None:
    """By hidden, views and weight, from float64 and g = ∂loss/∂logp [K+1, B, T]."""
    states = torch.cat([case["hidden"][None], case["view_hidden"]]).detach()
    d, tokens = states.shape[-1], case["tokens"].reshape(-1)
    active = g.reshape(-1).nonzero()[:, 0]
    rows, slopes = states.reshape(-1, d)[active].double(), g.reshape(-1)[active, None].double()
    labels = tokens.repeat(len(states))[active, None]
    parts = list(case["weight"].detach().split(16_384))
    lse = torch.stack([(rows @ w.double().T).logsumexp(1) for w in parts]).logsumexp(0)
    dstates, size, first = torch.zeros_like(rows), torch.zeros_like(rows[:, 0]), 0
    for w, mine in zip(parts, got[2].split(16_384), strict=True):
        dz = -slopes * (rows @ w.double().T - lse[:, None]).exp()
        here = (labels >= first) & (labels < first + len(w))
        dz.scatter_add_(1, (labels - first).clamp(0, len(w) - 1), torch.where(here, slopes, 0.0))
        dstates += dz @ w.double()
        size += dz.abs() @ w.double().norm(dim=1)
        check_rows("weight", mine, dz.T @ rows, dz.abs().T @ rows.norm(dim=1))
        first += len(w)
    mine = torch.cat([got[0][None], got[1]]).reshape(-1, d)
    for name, part in (("hidden", active < len(tokens)), ("views", active >= len(tokens))):
        check_rows(name, mine[active[part]], dstates[part], size[part])
    assert not mine.index_fill(0, active, 0.0).any()


def hold_whole_loss(case: dict[str, Any], device: str, **how: Any) -> None:
    """Log-probs and differences to their bounds; gradients for the kernel's own log-probs.

    Choice of views and slopes come from PyTorch's loss of these: with float64's log-probs another
    of two views that are as bad could be the worst.
    """
    out, got = card.run(case, **how)
    with torch.no_grad():
        scored = torch.cat([out.logp[None], out.view_logp]).flatten(1)
        states = torch.cat([case["hidden"][None], case["view_hidden"]]).flatten(1, 2)
        unit = matrix_unit(device)
        check_views(scored, states, case["weight"].detach(), case["tokens"].reshape(-1), unit)
    constants = {
        name: case[name]
        for name in ("mask", "advantages", "correct", "aux_view", "old_logp", "config")
        if name in case
    }
    leaves = [x.detach().requires_grad_() for x in (out.logp, out.view_logp)]
    loss = roma.roma_loss_from_logp(*leaves, **constants, backend="torch")
    assert torch.equal(loss.worst_view, out.worst_view)
    slopes = torch.autograd.grad(loss.loss, leaves)
    check_gradients(case, torch.cat([slopes[0][None], slopes[1]]), got)


def full_case(device: str, worst_over: str) -> dict[str, Any]:
    sizes = FULL if device == "cuda" else SMALL
    shape = (sizes["sequences"], sizes["length"])
    config = RomaConfig(worst_over=worst_over, log_ratio_clamp=100.0)
    old = torch.full(shape, -20.0, device=device)
    return compare_whole.on_leaves(card.draw(device, config=config, old_logp=old, **sizes))


def test_a_head_of_full_size(device: str, plan: str) -> None:
    """D = 4096, V = 151,936, bf16, 5 × 64 rows, against float64 on the same device."""
    hold_whole_loss(full_case(device, "sequence"), device)


def test_a_head_of_full_size_without_recompute(device: str) -> None:
    """The token-local path, which a workspace for all rows' logits turns on."""
    hold_whole_loss(full_case(device, "token"), device, workspace=2**31)


def test_a_head_of_full_size_in_pytorch(device: str) -> None:
    hold_whole_loss(full_case(device, "sequence"), device, backend="torch")


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12])
def test_a_row_that_is_certain_is_exact(device: str, size: float) -> None:
    """However large its logits: e⁰ is 1 and the others underflow, so logp, H and dz are 0.

    A card multiplies and adds in one rounding where a kernel lets it. Of an exponent z·s − peak·s
    half a place of the peak would be left, a factor of up to 2⁸ at logits of 1e8.
    """
    spec = HeadSpec(shape=(70,), d=32, v=1544, dtype=torch.bfloat16, entropy=True)
    inputs = spec.make()
    inputs["hidden"] *= size / float((inputs["hidden"] @ inputs["weight"].T).abs().max())
    logits = inputs["hidden"].double() @ inputs["weight"].double().T
    (first, second), inputs["tokens"] = logits.topk(2).values.T, logits.argmax(1)
    # e⁻¹⁰⁴ is below fp32's least number; a sum of 32 products is off by 32·eps of their size.
    certain = first - second > 104 + 2 * 32 * tolerance.eps(torch.float32) * size
    assert int(certain.sum()) > 35
    inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    hidden = inputs["hidden"].requires_grad_()
    got = compare_head.score(inputs, "triton", entropy=True)
    (dhidden,) = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), hidden)
    for value in (got.logp.detach(), got.entropy.detach(), dhidden.abs().amax(1)):
        assert not bool(value[certain.to(device)].any())
    assert bool((got.logp <= 0).all()) and bool((got.entropy >= 0).all())


@contextmanager
def tf32() -> Iterator[None]:
    """As a user who wants speed elsewhere sets it."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("plan", ["triton", "vendor"], indirect=True)
def test_fp32_is_exact_where_tf32_is_allowed(device: str, plan: str) -> None:
    """Forward, recompute, dh and dW. tf32 keeps 10 bits: the same bound refuses its product."""
    spec = HeadSpec(shape=(70,), d=256, v=1000, bias=True, entropy=True)
    with tf32():
        compare_head.check_against_oracle(spec, card.there("linear_logprob", device))
        if device == "cuda":
            inputs = spec.make()
            h, w = inputs["hidden"].cuda(), inputs["weight"].cuda()
            want, noise = h.double() @ w.double().T, tolerance.product_error(h, w, None).noise
            assert tolerance.refuses("z", h @ w.T, want, want, dtype=h.dtype, noise=noise)


def test_fp32_is_exact_in_pytorch_where_tf32_is_allowed(device: str) -> None:
    with tf32():
        spec = HeadSpec(shape=(70,), d=256, v=1000)
        torch_backend = card.there("linear_logprob", device, backend="torch")
        compare_head.check_against_oracle(spec, torch_backend)
