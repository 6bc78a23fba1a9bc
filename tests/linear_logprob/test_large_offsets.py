"""Offsets beyond 2³¹ elements, on memory that is reserved and never touched but where the data lie.

A row stride of 2²⁷ takes 33 rows beyond 2³². The same numbers close together give the right answer,
and a kernel whose product of indices stays in 32 bits another: it wraps around to zeros, for which
there is room before the data.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support import interpreter as repaired
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

import roma
from roma_kernels.linear_logprob.rows import Rows
from roma_kernels.linear_logprob.triton import dlogits, gather, tile, vendor
from roma_kernels.linear_logprob.triton.tuning import override

STRIDE = 2**27
ROOM = 2**31  # elements before the data: how far back 32 bits can wrap
# 0x4000: MAP_NORESERVE of Linux, for which Python has no name before 3.13.
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


def reserve(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, of which no page exists before it is written."""
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    assert reach > 2**31
    size = (ROOM + reach) * dtype.itemsize
    whole = torch.frombuffer(mmap.mmap(-1, size, flags=RESERVED), dtype=dtype)
    return whole.as_strided(shape, strides, ROOM)


def far(near: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers at other strides."""
    return reserve(near.shape, strides, near.dtype).copy_(near)


@pytest.fixture(autouse=True)
def reserves() -> None:
    try:
        mmap.mmap(-1, 2**35, flags=RESERVED).close()
    except (OSError, ValueError) as error:
        pytest.skip(f"no 32 GiB of addresses: {error}")


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    upstream: Tensor


def draw(rows: int = 33, depth: int = 33, vocab: int = 129) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, depth, generator=generator).bfloat16() for n in (rows, vocab))
    tokens = torch.arange(rows) * 7 % vocab
    tokens[-1] = vocab - 1
    return Inputs(hidden, weight, tokens, torch.randn(rows, generator=generator))


def score(inputs: Inputs, backend: str) -> list[Tensor]:
    """Log-probs and both gradients."""
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    out = roma.linear_logprob(hidden, weight, inputs.tokens, backend=backend)
    gradients = torch.autograd.grad(out.logp, (hidden, weight), inputs.upstream)
    return [out.logp.detach(), out.lse, *gradients]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


FAR = {
    # 2²⁷ + 1: no rows of 16 bytes, hence pointers where descriptors would serve
    "hidden": lambda x: x._replace(hidden=far(x.hidden, (STRIDE + 1, 1))),
    "hidden, described": lambda x: x._replace(hidden=far(x.hidden, (STRIDE, 1))),
    "weight": lambda x: x._replace(weight=far(x.weight, (STRIDE + 1, 1))),
    "weight, described": lambda x: x._replace(weight=far(x.weight, (STRIDE, 1))),
    "weight by columns": lambda x: x._replace(weight=far(x.weight, (1, STRIDE))),
    "hidden by columns": lambda x: x._replace(hidden=far(x.hidden, (1, STRIDE))),
}


@pytest.mark.parametrize("what", FAR)
def test_inputs(what: str, kernel: str) -> None:
    near = draw(depth=40 if "described" in what else 33)
    assert same(score(FAR[what](near), kernel), score(near, kernel))


def narrowed(
    patch: pytest.MonkeyPatch,
    kernel: InterpretedFunction,
    number: int = 0,
    cast: str = ".to(tl.int64)",
) -> None:
    """Takes the `number`-th cast to 64 bits out of an interpreted kernel's source."""
    shipped = inspect.getsourcelines

    def without(function: Any) -> tuple[list[str], int]:
        lines, first = shipped(function)
        before, *after = "".join(lines).split(cast)
        assert number < len(after), f"{kernel.__name__} has no such cast"
        parts = [before]
        for i, part in enumerate(after):
            parts += ["" if i == number else cast, part]
        return "".join(parts).splitlines(keepends=True), first

    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(interpreter.inspect, "getsourcelines", without)
        rewritten = FunctionRewriter(kernel.fn).rewrite_ast()
    patch.setitem(InterpretedFunction.rewritten_fn, kernel.fn, rewritten)
    repaired._device_function.cache_clear()


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context
    repaired._device_function.cache_clear()


@pytest.mark.parametrize(
    ("what", "number"),
    [("hidden", 0), ("weight", 0), ("weight by columns", 1), ("hidden by columns", 1)],
)
def test_a_planted_32_bit_product_of_inputs_fails(
    what: str, number: int, patch: pytest.MonkeyPatch
) -> None:
    near = draw()
    want, distant = score(near, "triton"), FAR[what](near)
    narrowed(patch, tile._load, number)
    assert same(score(near, "triton"), want)
    assert not same(score(distant, "triton"), want)


def far_rows(shipped: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same temporary with rows 2²⁷ elements apart."""

    def blank(*args: Any) -> Tensor:
        near = shipped(*args)
        return far(near, (STRIDE, 1))

    return blank


TEMPORARIES = {
    "dz": ("triton", dlogits, "blank_dlogits", dlogits._dlogits_kernel),
    "vendor's dz": ("vendor", vendor, "blank_dlogits", vendor._row_dlogits_kernel),
    "vendor's logits": ("vendor", vendor, "blank_logits", vendor._row_sums_kernel),
}


@pytest.mark.parametrize("what", TEMPORARIES)
def test_temporaries(what: str, patch: pytest.MonkeyPatch) -> None:
    """Logits, and gradients by them, of more than 2³¹ elements; a planted product fails."""
    plan, module, name, kernel = TEMPORARIES[what]
    near = draw()
    with override(f"plan={plan}"):
        want = score(near, "triton")
        patch.setattr(module, name, far_rows(getattr(module, name)))
        assert same(score(near, "triton"), want)
        narrowed(patch, kernel)
        assert not same(score(near, "triton"), want)


def test_rows_of_views(patch: pytest.MonkeyPatch) -> None:
    """Gathered from, and scattered to, positions whose elements lie beyond 2³¹."""
    depth, count = 2**15, 2**16 + 8
    near = torch.randn(4, depth, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden, views, dhidden, dviews = (
        reserve((count, depth), (depth, 1), near.dtype) for _ in range(4)
    )
    hidden[0], hidden[-1], views[0], views[-1] = near
    tokens = torch.zeros(count, dtype=torch.int64)
    rows = Rows(hidden, views[None], tokens, None, None, None)
    chosen = torch.tensor([0, 2 * count - 2, 1, 2 * count - 1])
    assert torch.equal(gather.gather_rows(rows, chosen), near)
    last = slice(2 * count - 2, 2 * count)
    assert torch.equal(gather.gather_rows(rows, last), near[[1, 3]])
    gather.scatter_rows_into(dhidden, dviews[None], rows, chosen, None, near.float())
    for got, (first, end) in ((dhidden, near[:2]), (dviews, near[2:])):
        assert torch.equal(got[0], first) and torch.equal(got[-1], end)
        assert not got[[1, -2]].any()
    narrowed(patch, gather._gather_rows_kernel)
    assert not torch.equal(gather.gather_rows(rows, last), near[[1, 3]])
