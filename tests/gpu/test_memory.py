"""How much memory a call takes, and what lies beyond 2³¹ elements of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import card
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import compare_whole, count_products, tolerance
from roma_kernels.linear_logprob.triton.tuning import PLANS, override

MEMORY = {"views": 4, "sequences": 8, "length": 256, "depth": 1024, "vocab": 151_936}


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("what", ["triton", "vendor", "gluon", "torch", "without recompute"])
def test_memory(what: str) -> None:
    """K = 4, 2048 tokens: inputs, fp32 gradients, workspace, partial sums, ten chunks of logits.

    2.0 GB with the default workspace, where the logits would take 6.2 in fp32. Active are the clean
    rows, those of the sampled views, and, of right sequences, half of all, those of the worst.
    """
    config = RomaConfig(worst_over="token" if what == "without recompute" else "sequence")
    workspace = 2**32 if what == "without recompute" else 2**29
    how = {"backend": "torch" if what == "torch" else "triton", "workspace": workspace}
    case = compare_whole.on_leaves(card.draw("cuda", config=config, **MEMORY))
    with override(f"plan={what}" if what in PLANS else ""):
        card.run(case, **how)  # compiles; libraries take their buffers
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with count_products() as count:
            card.run(case, **how)
    extra = torch.cuda.max_memory_allocated() - before
    tokens, vocab, depth = 2048, MEMORY["vocab"], MEMORY["depth"]
    rows = 5 * tokens
    inputs, gradients = 2 * (rows + vocab) * depth, 4 * (rows + vocab) * depth
    partial_sums, chunks = 2 * 4 * rows * (vocab // 128 + 1), 10 * 4 * 2048 * 4096
    limit = inputs + gradients + workspace + partial_sums + chunks + 256 * rows
    assert extra <= limit < 4 * rows * vocab
    assert tokens < count.rows("dhidden", vocab) <= 2.5 * tokens


def score(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Log-probs and gradients; tokens all over the vocabulary, its end included."""
    rows, vocab = len(hidden), len(weight)
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    tokens = (torch.arange(rows, device=hidden.device) * 7 + vocab - 1) % vocab
    upstream = torch.linspace(-1, 1, rows, device=hidden.device)
    out = roma.linear_logprob(hidden, weight, tokens, backend="triton")
    return [out.logp.detach(), *torch.autograd.grad(out.logp, (hidden, weight), upstream)]


def far(near: Tensor, strides: tuple[int, int]) -> Tensor:
    """The same numbers at other strides, in memory of its own."""
    reach = sum((n - 1) * stride for n, stride in zip(near.shape, strides, strict=True)) + 1
    whole = torch.zeros(reach, dtype=near.dtype, device=near.device)
    return whole.as_strided(near.shape, strides).copy_(near)


def assert_same(got: list[Tensor], want: list[Tensor], log_probs: int = 1) -> None:
    """Log-probs to a few roundings, bf16 gradients to two; at their end too.

    A library may add in another order for other strides and sizes; what wraps around is far off.
    """
    for mine, theirs in zip(got[:log_probs], want, strict=False):
        assert float((mine - theirs).abs().max()) <= tolerance.few(theirs.abs().max())
    for mine, theirs in zip(got[log_probs:], want[log_probs:], strict=True):
        mine, theirs = (x.double().flatten(0, -2) for x in (mine, theirs))
        for part in (slice(None), slice(-50, None)):
            off = (mine[part] - theirs[part]).norm() / theirs[part].norm()
            assert float(off) <= 2 * 2**-8


def test_inputs_beyond_2_31(plan: str, device: str) -> None:
    """Elements up to 2.2e9 (on the CPU: a million) apart."""
    rows, vocab, depth = (300 if device == "cuda" else 30), 1544, 200
    reach = 2.2e9 if device == "cuda" else 1e6
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (
        torch.randn(n, depth, generator=generator, device=device).bfloat16() for n in (rows, vocab)
    )
    want = score(hidden, weight)
    # Rows of 16 bytes, as near ones have.
    assert_same(score(far(hidden, (int(reach / rows) // 8 * 8, 1)), weight), want)
    assert_same(score(hidden, far(weight, (int(reach / vocab) // 8 * 8, 1))), want)
    assert_same(score(hidden, far(weight, (1, int(reach / depth)))), want)


def whole(device: str, workspace: int, worst_over: str, **sizes: Any) -> list[Tensor]:
    """Log-probs and gradients of a loss with one view."""
    config = RomaConfig(worst_over=worst_over, log_ratio_clamp=100.0)
    case = card.draw(device, views=1, config=config, **sizes)
    out, gradients = card.run(compare_whole.on_leaves(case), workspace=workspace)
    return [out.logp.detach(), out.view_logp.detach(), *gradients]


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_logits_beyond_2_31(worst_over: str, device: str) -> None:
    """16,500 rows × 131,111 columns of dlogits in one workspace ("sequence"), or logits ("token").

    A smaller workspace gives other sums of the same terms.
    """
    sizes = {"sequences": 2, "length": 4125, "depth": 64, "vocab": 131_111}
    if device == "cpu":
        sizes |= {"length": 30, "vocab": 3001}
    large, small = (2**34, 2**31) if device == "cuda" else (2**24, 2**16)
    with count_products() as count:
        got = whole(device, large, worst_over, **sizes)
    assert count.rows("forward", sizes["vocab"]) >= 4 * sizes["length"]
    assert_same(got, whole(device, small, worst_over, **sizes), log_probs=2)


def test_positions_beyond_2_31(device: str) -> None:
    """Clean states and a view of 524,300 × 4096 elements each, of which 80 tokens count."""
    count, depth = (524_300, 4096) if device == "cuda" else (600, 64)
    chosen = torch.cat([torch.arange(40), torch.arange(count - 40, count)]).to(device)
    case = card.draw(device, views=1, sequences=1, length=80, depth=depth, vocab=1544)
    near = case | {"weight": case["weight"].requires_grad_()}
    want = roma.roma_loss(**near, backend="triton")
    spread = {}
    for name in ("hidden", "view_hidden", "tokens", "mask"):
        axis = 2 if name == "view_hidden" else 1
        shape = list(case[name].shape)
        shape[axis] = count
        spread[name] = case[name].new_zeros(shape).index_copy_(axis, chosen, case[name])
    got = roma.roma_loss(**near | spread, backend="triton")
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logp[:, chosen], want.logp)
    gradients = (torch.autograd.grad(out.loss, near["weight"])[0] for out in (got, want))
    assert torch.equal(*gradients)
