"""What a card's driver and compiler are asked for: captures, waits, compilations, other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import card, pairs
from torch import Tensor

import roma
from roma import RomaConfig, RomaLoss
from roma.testing import compare_whole
from roma.testing.matrix_unit import matrix_unit
from roma.testing.strategies import LossSpec
from roma_kernels.linear_logprob.triton import dlogits, forward, vendor
from roma_kernels.linear_logprob.triton.tuning import FEW_ROWS, PLANS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("as_users")]


class Graph:
    """roma_loss with its backward, captured once on a case's shapes and replayed on others."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.static = card.moved(case, "cuda")
        self.graph = torch.cuda.CUDAGraph()
        with card.watched() as seen, torch.cuda.graph(self.graph):
            self.out, self.gradients = card.run(self.static)
        self.brought = seen

    def __call__(self, *positional: Tensor, **named: Any) -> RomaLoss:
        names = ("hidden", "view_hidden", "weight", "tokens")
        case = dict(zip(names, positional, strict=True)) | named
        with torch.no_grad():
            for name, value in case.items():
                if isinstance(value, Tensor):
                    self.static[name].copy_(value)
        self.graph.replay()
        out = RomaLoss(*(clone(part) for part in self.out))
        leaves = [case[name] for name in compare_whole.LEAVES if case[name] is not None]
        loss = _Found.apply(out.loss, [g.clone() for g in self.gradients], *leaves)
        return out._replace(loss=loss)


def clone(part: Any) -> Any:
    """Apart from what the next replay overwrites."""
    if isinstance(part, dict):
        return {name: x.detach().clone() for name, x in part.items()}
    return part.detach().clone()


class _Found(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, None, *((upstream * g).to(g.dtype) for g in ctx.gradients)


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [("triton", torch.bfloat16), ("vendor", torch.bfloat16), ("triton", torch.float32)],
    indirect=["plan"],
)
def test_a_captured_loss(plan: str, dtype: torch.dtype) -> None:
    """Warmed up with at most 18 active rows, captured with 144, replayed on other masks and rows.

    The driver forbids to bring a kernel to the device inside a capture. Rows without a gradient
    take part as zeros, so that gradients are other sums of the same terms: held to the oracle.
    """
    specs = [LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True, seed=s, dtype=dtype) for s in range(3)]
    few = specs[0].make() | {"advantages": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    few["correct"] = torch.zeros_like(few["correct"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _, gradients = card.run(card.moved(few, "cuda"))
    torch.cuda.current_stream().wait_stream(stream)
    active = sum(int(g.any(-1).sum()) for g in gradients[:2])
    assert 0 < active <= 18
    everything = specs[0].make() | {"correct": torch.ones(4, dtype=torch.bool)}
    replayed = Graph(everything | {"mask": torch.ones_like(everything["mask"])})
    assert replayed.brought == []
    candidate = roma.testing.candidate.on_device(replayed, "cuda")
    for spec in specs:
        compare_whole.check_against_oracle(spec, candidate, unit=matrix_unit("cuda"))
        case = card.moved(spec.make(), "cuda")
        out, _ = card.run(case)
        positional, named = compare_whole.split(case)
        again = replayed(*positional, **named)
        # The vendor's product, which fp32 takes too, may choose another order for other rows.
        fused = plan == "triton" and dtype != torch.float32
        for name in ("loss", "logp", "view_logp", "worst_view") if fused else ():
            assert torch.equal(getattr(again, name), getattr(out, name)), name


@pytest.mark.parametrize("on_pairs", [False, True], ids=["dense", "pairs"])
def test_the_forward_does_not_wait(on_pairs: bool) -> None:
    """In 16 bits: fp32 is the vendor's product, which is sized by the host."""
    spec = LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True, dtype=torch.bfloat16)
    case = spec.make()
    if on_pairs:
        case = pairs.laid_out(case, pairs.needed(case))
    case = card.moved(case, "cuda")
    card.run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compare_whole.call(case, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_sizes_compile_nothing(plan: str) -> None:
    """Twenty numbers of rows, slices that begin anywhere: after two calls every kernel is there."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = {"generator": generator, "device": "cuda"}
    depth, vocab, room = 200, 1544, 1000
    hidden, weight = (torch.randn(n, depth, **sizes).bfloat16() for n in (room, vocab))
    tokens = torch.randint(vocab, (room,), **sizes)
    temperature = 0.5 + torch.rand(room, **sizes)
    upstream = torch.randn(room, **sizes)
    weight.requires_grad_()

    def call(first: int, count: int) -> None:
        part = slice(first, first + count)
        states = hidden[part].detach().requires_grad_()
        out = roma.linear_logprob(
            states, weight, tokens[part], temperature=temperature[part], backend="triton"
        )
        active = upstream[part] * (torch.arange(count, device="cuda") % 3 > 0)
        torch.autograd.grad(out.logp, (states, weight), active)

    for rows in (range(1, FEW_ROWS, 3), range(FEW_ROWS + 1, 400, 17)):
        call(0, rows[0] + 2)
        call(1, rows[0] + 3)
        with card.watched() as seen:
            for first, count in enumerate(rows[:20], start=2):
                call(first, count)
        assert seen == []


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_other_masks_and_lengths_compile_nothing(worst_over: str) -> None:
    """A whole loss as a trainer calls it: other lengths, other right answers in each step."""

    def step(seed: int) -> None:
        config = RomaConfig(worst_over=worst_over)
        spec = LossSpec(b=4, t=30 + seed, k=3, d=64, v=257, seed=seed, config=config,
                        dtype=torch.bfloat16)  # fmt: skip
        card.run(card.moved(spec.make(), "cuda"))

    step(0)
    step(1)
    with card.watched() as seen:
        for seed in range(2, 12):
            step(seed)
    assert seen == []


def test_inductor() -> None:
    """One graph, bit by bit the eager result."""
    torch._dynamo.reset()
    case = card.moved(LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True).make(), "cuda")
    for backend in ("triton", "torch"):
        want, want_gradients = card.run(case, backend=backend)
        compiled = torch.compile(
            lambda backend=backend, **x: compare_whole.call(x, backend), fullgraph=True
        )
        got = compiled(**case)
        leaves = [case[name] for name in compare_whole.LEAVES]
        assert torch.equal(got.loss, want.loss) and torch.equal(got.worst_view, want.worst_view)
        gradients = torch.autograd.grad(got.loss, leaves)
        for mine, theirs in zip(gradients, want_gradients, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tensors_of_another_device(backend: str) -> None:
    """On cuda:1 while cuda:0 is the current one, also for the thread of the backward."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    for spec in (LossSpec(k=3, d=64, v=257, dtype=torch.bfloat16, seed=seed) for seed in range(3)):
        with torch.cuda.device(0):
            there = card.there("roma_loss", "cuda:1", backend=backend)
            compare_whole.check_against_oracle(spec, there, unit=matrix_unit("cuda:1"))
            assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    ("plan", "worst_over"),
    [*((plan, "sequence") for plan in PLANS), ("triton", "token")],
    indirect=["plan"],
)
def test_two_runs_are_bitwise_equal(plan: str, worst_over: str) -> None:
    config = RomaConfig(worst_over=worst_over)
    spec = LossSpec(b=8, t=40, k=4, d=256, v=4000, dtype=torch.bfloat16, bias=True, config=config)
    first, second = (card.run(card.moved(spec.make(), "cuda")) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def test_plans_change_what_is_launched(plan: str) -> None:
    """A plan that nothing follows would let every test of it pass."""
    if plan == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("gluon's kernels are for sm_90")
    from roma_kernels.linear_logprob.gluon import dlogits as gluon_dlogits
    from roma_kernels.linear_logprob.gluon import forward as gluon_forward

    kernels = {
        "triton": (forward._linear_logprob_fwd_kernel, dlogits._dlogits_kernel),
        "vendor": (vendor._row_sums_kernel, vendor._row_dlogits_kernel),
        "gluon": (gluon_forward._gluon_fwd_kernel, gluon_dlogits._gluon_dlogits_kernel),
    }
    named = {
        f"{name} {i}": kernel for name, pair in kernels.items() for i, kernel in enumerate(pair)
    }
    # Two views and the worst sequence: one view has its logits from the vendor's product, always.
    spec = LossSpec(b=8, t=10, k=2, d=64, v=512, dtype=torch.bfloat16)
    with card.launched(**named) as seen:
        card.run(card.moved(spec.make(), "cuda"))
    assert seen == {f"{plan} 0", f"{plan} 1"}
