"""The compiled CPU kernels: every instruction set, threads, forks; the rest is in shared tests."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import roma
from roma.info import info
from roma.testing import compare_head
from roma.testing.strategies import HeadSpec, head_specs
from roma_kernels.backends import choose
from roma_kernels.linear_logprob import native_backend
from roma_kernels.native import native

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def threads() -> Iterator[None]:
    """What a test sets is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Log-probs, entropy and all gradients, under every option.

    Inputs are so small that torch itself uses one thread: a race detector cannot follow its own.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*size, generator=draw).to(dtype).requires_grad_()
        for size in ((70, 33), (801, 33), (801,))
    )
    tokens = torch.randint(801, (70,), generator=draw)
    out = roma.linear_logprob(
        hidden, weight, tokens, bias=bias, softcap=15.0, entropy=True, backend="native"
    )
    slopes = torch.randn(2, 70, generator=draw)
    ((out.logp * slopes[0]).sum() + (out.entropy * slopes[1]).sum()).backward()
    return [out.logp.detach(), out.entropy.detach(), hidden.grad, weight.grad, bias.grad]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(spec=head_specs())
@settings(max_examples=100)
def test_every_instruction_set_against_the_oracle(level: str, spec: HeadSpec) -> None:
    compare_head.check_against_oracle(spec, "native")


# Vectors of 4 to 16, panels of 4 or 12 entries and 12 to 32 rows, chunks of 768 entries, chains of
# 128 steps: one less, none over, one more.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "d", "v"),
    [(31, 127, 11), (32, 128, 12), (33, 129, 13), (12, 255, 767), (24, 256, 768), (25, 257, 769),
     (1, 1, 1), (65, 513, 1537)],
)  # fmt: skip
def test_edges_of_blocks(rows: int, d: int, v: int, dtype: torch.dtype, level: str) -> None:
    spec = HeadSpec(shape=(rows,), d=d, v=v, dtype=dtype, bias=True, softcap=20.0, entropy=True)
    compare_head.check_against_oracle(spec, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_for_any_number_of_threads(
    dtype: torch.dtype, level: str, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_backend, "_FLOP_PER_THREAD", 1)  # as many as there are, always
    torch.set_num_threads(1)
    alone = everything(dtype=dtype)
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        assert same(everything(dtype=dtype), alone)


def test_several_python_threads(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls at the same time do not touch each other."""
    monkeypatch.setattr(native_backend, "_FLOP_PER_THREAD", 1)
    torch.set_num_threads(2)
    alone = [everything(seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: everything(seed=seed), list(range(8)) * 3))
    assert all(same(found, alone[i % 8]) for i, found in enumerate(together))


def log_probs() -> Tensor:
    """Of few numbers: torch's own threads do not survive a fork, and must not be asked for."""
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(70, 32, generator=draw), torch.randn(801, 32, generator=draw)
    return roma.linear_logprob(hidden, weight, torch.arange(70), backend="native").logp


def test_after_a_fork(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data loader's worker may call it, also after its parent did."""
    monkeypatch.setattr(native_backend, "_FLOP_PER_THREAD", 1)
    torch.set_num_threads(3)
    want = log_probs()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(log_probs().numpy()), daemon=True)
    child.start()
    got = queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0 and torch.equal(torch.from_numpy(got), want)


def test_python_goes_on_meanwhile() -> None:
    """The interpreter's lock is free while the kernels run."""
    hidden, weight = torch.randn(256, 256), torch.randn(20_000, 256)
    tokens = torch.zeros(256, dtype=torch.int64)
    spans: list[tuple[float, float]] = []

    def call() -> None:
        for _ in range(3):
            begin = time.perf_counter()
            roma.linear_logprob(hidden, weight, tokens, backend="native")
            spans.append((begin, time.perf_counter()))

    worker, ticks = threading.Thread(target=call), []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(1e-4)
    worker.join()
    longest = max(spans, key=lambda span: span[1] - span[0])
    assert sum(longest[0] < tick < longest[1] for tick in ticks) >= 3


def test_auto_takes_it() -> None:
    assert choose("cpu")[0] == "native"
    hidden, weight, tokens = torch.randn(5, 8), torch.randn(9, 8), torch.arange(5)
    native_logp = roma.linear_logprob(hidden, weight, tokens, backend="native").logp
    assert torch.equal(roma.linear_logprob(hidden, weight, tokens).logp, native_logp)
    exact = roma.linear_logprob(hidden.double(), weight.double(), tokens)
    assert exact.logp.dtype == torch.float64
    with pytest.raises(ValueError, match="native has no float64 products"):
        roma.linear_logprob(hidden.double(), weight.double(), tokens, backend="native")


def test_info_says_which_instruction_set(level: str) -> None:
    (row,) = (row for row in info()["backends"] if row["name"] == "native")
    assert row["available"] and f"for {level}," in row["reason"]


@pytest.mark.parametrize("wrong", ["sse9", "AVX2", ""])
def test_an_unknown_instruction_set(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROMA_CPU_LEVEL", wrong)
    with pytest.raises(ValueError, match=r"ROMA_CPU_LEVEL: expected one of portable.*unset it"):
        roma.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="native")


def test_an_instruction_set_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roma_kernels.native.native", lambda: native()._replace(cpu_level="avx2"))
    monkeypatch.setenv("ROMA_CPU_LEVEL", "avx512")
    with pytest.raises(ValueError, match=r"expected one of portable, avx2 on this CPU, got 'avx51"):
        roma.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), backend="native")


def test_auto_takes_it_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator looks when it runs; both ways give the same bits."""
    calls = []
    sweep = native_backend.KERNELS.sweep
    watched = native_backend.KERNELS._replace(sweep=lambda *x: (calls.append(1), sweep(*x))[1])
    monkeypatch.setattr(native_backend, "KERNELS", watched)
    hidden = torch.randn(5, 8, requires_grad=True)
    weight, tokens = torch.randn(9, 8), torch.arange(5)

    def logp() -> Tensor:
        return roma.linear_logprob(hidden, weight, tokens).logp

    compiled_logp = torch.compile(logp, backend="aot_eager", fullgraph=True)()
    (by_graph,) = torch.autograd.grad(compiled_logp.sum(), hidden)
    (by_hand,) = torch.autograd.grad(logp().sum(), hidden)
    assert len(calls) == 2 and torch.equal(compiled_logp, logp()) and torch.equal(by_graph, by_hand)
