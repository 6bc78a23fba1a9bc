"""Products are what the code says, whatever the process allows, on the device of their tensors."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import roma
from roma.testing import compare_whole, count_products
from roma.testing.strategies import LossSpec
from roma_kernels import products
from roma_kernels.linear_logprob import op as head_op
from roma_kernels.roma_loss import op as loss_op
from roma_kernels.roma_loss.token_local import op as token_local_op

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture
def allowed():
    """What speeds products up and rounds them: tf32, bf16 for fp32, sums in 16 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def switches() -> tuple:
    return (
        CUDA.fp32_precision, CPU.fp32_precision, CUDA.allow_bf16_reduced_precision_reduction,
        CUDA.allow_fp16_reduced_precision_reduction, CUDA.allow_fp16_accumulation,
    )  # fmt: skip


EXACT = ("ieee", "ieee", False, False, False)


def test_exact_inside_and_as_before_outside(allowed: None) -> None:
    before = switches()
    assert before == ("tf32", "bf16", True, True, False)
    with products.as_written(torch.ones(1)):
        assert switches() == EXACT
        with products.as_written(torch.ones(1)):
            assert switches() == EXACT
        assert switches() == EXACT
    assert switches() == before
    with pytest.raises(RuntimeError), products.as_written(torch.ones(1)):
        raise RuntimeError
    assert switches() == before


def test_the_last_of_two_threads_switches_back(allowed: None) -> None:
    """Autograd has a thread for each GPU; the first to end must not take the other's exactness."""
    before, seen = switches(), []
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with products.as_written(torch.ones(1)):
            entered.set()
            leave.wait()
            seen.append(switches())

    thread = threading.Thread(target=other)
    with products.as_written(torch.ones(1)):
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert seen == [EXACT] and switches() == before


def test_a_head_in_fp32_is_exact_where_bf16_is_allowed(kernel: str, allowed: None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator) for n in (64, 512))
    tokens = torch.arange(64)
    got = roma.linear_logprob(hidden, weight, tokens, backend=kernel).logp
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, roma.linear_logprob(hidden, weight, tokens, backend=kernel).logp)


def test_the_tensors_device_is_current() -> None:
    """On a GPU that is not the current one a kernel would be launched where its tensors are not."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with mock.patch("torch.cuda.device") as device, mock.patch("torch.autocast"):
        with products.as_written(x):  # type: ignore[arg-type]
            device.assert_called_once_with(torch.device("cuda", 1))
            device.return_value.__enter__.assert_called_once()
        device.return_value.__exit__.assert_called_once()


def test_every_operator_works_as_written() -> None:
    """Forward and backward of the head, the loss of log-probs, the token-local path."""
    inside: list[str] = []

    def watch(module):
        return mock.patch.object(
            module, "as_written", lambda x: inside.append(module.__name__) or as_written(x)
        )

    as_written = products.as_written
    with watch(head_op), watch(loss_op), watch(token_local_op):
        case = LossSpec(b=2, t=4, k=2, d=8, v=33).make()
        case["config"] = roma.RomaConfig(worst_over="sequence")
        compare_whole.call(compare_whole.on_leaves(case), "triton").loss.backward()
        assert inside == [head_op.__name__, loss_op.__name__, head_op.__name__]
        inside.clear()
        case["config"] = roma.RomaConfig(worst_over="token")
        compare_whole.call(compare_whole.on_leaves(case), "triton").loss.backward()
        assert inside == [token_local_op.__name__]


def test_products_of_another_thread_are_counted() -> None:
    """A backward on a GPU runs in a thread of autograd's."""
    with count_products() as count:
        thread = threading.Thread(target=products.report, args=("dhidden", 5, 7, 2))
        thread.start()
        thread.join()
        with count_products() as inner:
            products.report("dweight", 1, 7, 2)
    assert count.rows("dhidden", 7) == 5 and count.rows("dweight", 7) == 1
    assert inner.rows("dhidden", 7) == 0 and not products.listening()
