"""The interpreter of tests/support: what it replays is what Triton's own would have computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support import recorder
from torch import Tensor

from roma import RomaConfig
from roma.testing import compare_head, compare_whole
from roma.testing.strategies import HeadSpec, LossSpec


@triton.jit
def _add_kernel(out_ptr, x_ptr, y_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(y_ptr))


@triton.jit
def _sum(x, y):
    return x + y


@triton.jit
def _sums_kernel(out_ptr, x_ptr, y_ptr):
    x, y = tl.load(x_ptr), tl.load(y_ptr)
    tl.store(out_ptr, _sum(x, x))
    tl.store(out_ptr + 1, _sum(x, y))


@triton.jit
def _half_or_double(x):
    if x > 0:
        return x * 2
    else:
        return x / 2


@triton.jit
def _branch_kernel(out_ptr, x_ptr):
    tl.store(out_ptr, _half_or_double(tl.load(x_ptr)))


@triton.jit
def _masked_kernel(out_ptr, x_ptr, other_ptr):
    other = tl.load(other_ptr)
    tl.store(out_ptr, tl.load(x_ptr, False, other=other))


@triton.jit
def _program(scale):
    return tl.program_id(0) * scale


@triton.jit
def _programs_kernel(out_ptr, n):
    for i in range(0, n):
        tl.store(out_ptr + tl.program_id(0) * n + i, _program(10) + i)


@triton.jit
def _loop_kernel(out_ptr, n):
    for i in range(0, n):
        tl.store(out_ptr + i, i.to(tl.float32) / 2)


@triton.jit
def _float_kernel(out_ptr, x):
    tl.store(out_ptr, (x + 1.0) - x)


@triton.jit
def _mixed_kernel(out_ptr, x_ptr):
    tl.store(out_ptr, x_ptr + 0.5)


def ran(kernel: Any, *inputs: Any, size: int = 1, grid: tuple[int, ...] = (1,)) -> list[float]:
    out = torch.zeros(size)
    kernel[grid](out, *inputs)
    return out.tolist()


def test_types_decide_and_values_do_not() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert ran(_add_kernel, one, one) == [2.0]
    assert ran(_add_kernel, one, two) == [3.0]
    assert ran(_add_kernel, two, torch.tensor([5])) == [7.0]
    assert ran(_add_kernel, torch.tensor([2**31]), torch.tensor([5])) == [2.0**31]  # int64
    half = torch.tensor([0.5], dtype=torch.bfloat16)
    assert ran(_add_kernel, half, two) == [2.5]


def test_one_tensor_twice_is_not_two_tensors() -> None:
    """x + x is recorded first; x + y has the same types."""
    assert ran(_sums_kernel, torch.tensor([1.0]), torch.tensor([5.0]), size=2) == [2.0, 6.0]


def test_a_function_that_looks_at_a_value_is_not_replayed() -> None:
    for x, want in [(4.0, 8.0), (-4.0, -2.0), (3.0, 6.0)]:
        assert ran(_branch_kernel, torch.tensor([x])) == [want]


def test_what_stands_for_a_masked_element_may_be_zero_at_first() -> None:
    """The rules ask for its truth, and mean whether it was given."""
    for other in (0.0, 7.0, 0.0):
        assert ran(_masked_kernel, torch.tensor([1.0]), torch.tensor([other])) == [other]


def test_each_program_has_its_own_number() -> None:
    got = ran(_programs_kernel, 2, size=6, grid=(3,))
    assert got == [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]


def test_a_number_of_a_loop_is_a_tensor() -> None:
    """As it is where the kernel is compiled; so a loop of a thousand turns is recorded once."""
    assert ran(_loop_kernel, 3, size=3) == [0.0, 0.5, 1.0]


def test_a_float_is_a_float32() -> None:
    """As it is where the kernel is compiled: 2^24 + 1 is 2^24."""
    assert ran(_float_kernel, 2.0**24) == [0.0]


def test_a_wrong_type_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(Exception, match="invalid operands"):
            ran(_mixed_kernel, torch.tensor([1.0]))


def as_shipped(*_: Any) -> Any:
    raise recorder._CannotRecordError


def head(dtype: torch.dtype) -> list[Tensor]:
    """Everything that comes of one linear_logprob."""
    spec = HeadSpec(shape=(5,), v=129, bias=True, softcap=2.0, entropy=True, dtype=dtype)
    out, leaves = compare_head.call(spec.make(), spec, "triton")
    (out.logp.sum() + out.entropy.sum()).backward()
    return [*out, *(leaf.grad for leaf in leaves.values())]


def loss(worst_over: str, dtype: torch.dtype) -> list[Tensor]:
    """Everything that comes of one roma_loss."""
    config = RomaConfig(worst_over=worst_over, ref_coef=0.1)
    case = compare_whole.on_leaves(LossSpec(bias=True, config=config, dtype=dtype).make())
    out = compare_whole.call(case, "triton")
    out.loss.backward()
    grads = (case[name].grad for name in compare_whole.LEAVES if case[name] is not None)
    return [out.loss, out.logp, out.view_logp, out.worst_view, *out.metrics.values(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch", "mean"])
def test_replayed_and_shipped_are_bitwise_equal(
    worst_over: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, replayed = loss(worst_over, dtype), loss(worst_over, dtype)
    heads = head(dtype), head(dtype)
    monkeypatch.setattr(recorder, "_key", as_shipped)
    for got, want in [
        *zip(replayed, loss(worst_over, dtype), strict=True),
        *zip(first, replayed, strict=True),
        *zip(heads[0], heads[1], strict=True),
        *zip(heads[1], head(dtype), strict=True),
    ]:
        assert torch.equal(got, want)
