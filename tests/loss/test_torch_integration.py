"""The operators inside PyTorch: torch.compile, checkpointing, autocast, accumulation, opcheck."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import roma
from roma import RomaConfig
from roma.testing import compare_head, compare_logp, compare_whole
from roma.testing.strategies import HeadSpec, LossSpec
from roma_kernels.linear_logprob.op import linear_logprob_backward_op, linear_logprob_op
from roma_kernels.roma_loss.config import decoded
from roma_kernels.roma_loss.op import combine_op

LEAVES = compare_whole.LEAVES


def head(inputs: dict[str, Any], kernel: str) -> Tensor:
    out = roma.linear_logprob(**inputs, entropy=True, backend=kernel)
    return (out.logp * out.entropy).sum()


def head_case(**changes: Any) -> tuple[dict[str, Any], list[Tensor]]:
    inputs = HeadSpec(bias=True, entropy=True, **changes).make()
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    return inputs, leaves


def gradients(loss: Tensor, case: dict[str, Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [case[name] for name in LEAVES]))


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


class Nodes:
    """A compiler back end that runs the graph as it is and remembers what it calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.calls += [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        return module


@pytest.mark.parametrize("compiler", ["aot_eager", "nodes"])
def test_compiled_head_is_one_node(compiler: str, kernel: str) -> None:
    inputs, leaves = head_case()
    want = head(inputs, kernel)
    nodes = Nodes()
    backend = nodes if compiler == "nodes" else compiler
    compiled = torch.compile(lambda **x: head(x, kernel), fullgraph=True, backend=backend)
    got = compiled(**inputs)
    assert torch.equal(got, want)
    assert_equal(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))
    if compiler == "nodes":
        assert [call for call in nodes.calls if "roma" in call] == ["roma.linear_logprob.default"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("worst_over", ["sequence", "token", "batch"])
def test_compiled_loss_is_one_node_an_op(packed: bool, worst_over: str, kernel: str) -> None:
    """The number of counted tokens is a value, not a shape: nothing breaks the graph."""
    torch._dynamo.reset()  # one function, eight compilations at most: a case each
    config = RomaConfig(worst_over=worst_over)
    case = compare_whole.on_leaves(LossSpec(bias=True, packed=packed, config=config).make())
    want = compare_whole.call(case, kernel)
    nodes = Nodes()
    compiled = torch.compile(
        lambda **x: compare_whole.call(x, kernel), fullgraph=True, backend=nodes
    )
    got = compiled(**case)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.worst_view, want.worst_view)
    assert_equal(gradients(got.loss, case), gradients(want.loss, case))
    ours = [call for call in nodes.calls if "roma" in call]
    one_pass = kernel == "triton" and worst_over == "token"
    two = ["roma.linear_logprob.default", "roma.combine.default"]
    assert ours == (["roma.token_local_loss.default"] if one_pass else two)


def test_operators_keep_their_promises(kernel: str) -> None:
    """Schema, aliasing, fake tensors and autograd, as PyTorch's own checker sees them."""
    inputs, (hidden, weight, bias) = head_case()
    views = torch.stack([hidden.detach() + 0.1, hidden.detach()]).requires_grad_()
    tokens, index, count = inputs["tokens"], torch.arange(5), torch.tensor(4)
    shared = {"scale": 1.0, "softcap": 5.0, "backend": kernel, "group": None, "workspace": None}
    arguments = (hidden, views, weight, bias, [tokens, index, count, None])
    opcheck(linear_logprob_op, arguments, shared | {"entropy": True})
    bare = (hidden, None, weight, None, [tokens, None, None, None])
    opcheck(linear_logprob_op, bare, shared | {"entropy": True})
    by_row = (hidden, views, weight, bias, [tokens, index, count, torch.ones(5)])
    opcheck(linear_logprob_op, by_row, shared | {"entropy": True})
    logp, lse, entropy = linear_logprob_op(*arguments, **shared, entropy=True)
    upstream = [x.detach() for x in (lse, entropy, torch.ones_like(logp), entropy * 0)]
    frozen = [x.detach() for x in (hidden, views, weight, bias)]
    opcheck(
        linear_logprob_backward_op,
        (upstream, *frozen, [tokens, index, count, None]),
        shared | {"needs": [True, False, True]},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("every", [False, True])
def test_combine_keeps_its_promises(
    every: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of the operator from log-probs to the loss, also where no constant is None."""
    seen: list[tuple[Any, Any]] = []

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options))
        return combine_op(*arguments, **options)

    monkeypatch.setattr("roma_kernels.roma_loss.op.combine_op", watch)
    config = RomaConfig(ref_coef=0.1, aux_old="view") if every else RomaConfig()
    case = compare_logp.on_leaves(LossSpec(config=config, aux=every).make_logp())
    compare_logp.call(case, kernel)
    opcheck(combine_op, *seen.pop())


def test_no_second_derivative(kernel: str) -> None:
    inputs, leaves = head_case()
    (first,) = torch.autograd.grad(head(inputs, kernel), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
        first.sum().backward()


@pytest.mark.parametrize("form", ["hidden", "token", "logp"])
def test_no_second_derivative_of_the_loss(form: str, kernel: str) -> None:
    """Not even where the first would pass for a constant, and the second for a zero."""
    spec = LossSpec(config=RomaConfig(worst_over="token" if form == "token" else "sequence"))
    if form == "logp":
        case = compare_logp.on_leaves(spec.make_logp())
        loss, leaf = compare_logp.call(case, kernel).loss, case["view_logp"]
    else:
        case = compare_whole.on_leaves(spec.make())
        loss, leaf = compare_whole.call(case, kernel).loss, case["hidden"]
    for wanted in (loss, loss**2):
        (first,) = torch.autograd.grad(wanted, [leaf], create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
            first.sum().backward(retain_graph=True)


def test_retained_graph_gives_the_same_again(kernel: str) -> None:
    case = compare_whole.on_leaves(LossSpec(bias=True).make())
    loss = compare_whole.call(case, kernel).loss
    once = [
        g.clone() for g in torch.autograd.grad(loss, [case[n] for n in LEAVES], retain_graph=True)
    ]
    assert_equal(gradients(loss, case), once)


def test_gradients_of_micro_batches_accumulate(kernel: str) -> None:
    case = compare_whole.on_leaves(LossSpec(bias=True).make())
    compare_whole.call(case, kernel).loss.backward()
    once = [case[name].grad.clone() for name in LEAVES]
    compare_whole.call(case, kernel).loss.backward()
    assert_equal([case[name].grad for name in LEAVES], [2 * g for g in once])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scaled_loss_has_scaled_gradients(dtype: torch.dtype, kernel: str) -> None:
    """GradScaler: 2^16 is exact in every step, if nothing under- or overflows on the way."""
    spec = LossSpec(bias=True, dtype=dtype)
    plain, scaled = (compare_whole.on_leaves(spec.make()) for _ in range(2))
    compare_whole.call(plain, kernel).loss.backward()
    scale = 2.0**8 if dtype == torch.float16 else 2.0**16
    torch.amp.GradScaler("cpu", init_scale=scale).scale(
        compare_whole.call(scaled, kernel).loss
    ).backward()
    # fp16: gradients themselves leave the range of normal numbers, and are rounded there.
    slack = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name in LEAVES:
        off = (scaled[name].grad.double() / scale - plain[name].grad.double()).abs().max()
        assert off <= slack, name


def test_fp16_keeps_gradients_that_its_logits_could_not(kernel: str) -> None:
    """A mean over 10^5 tokens: p·g is 1e-7 and less, below fp16; dW and dh are not."""
    spec = HeadSpec(shape=(17,), d=8, v=257, dtype=torch.float16)
    inputs = spec.make()
    g = torch.full((17,), 1e-5)
    want = compare_head.run_oracle(inputs, {"logp": g}, torch.float64)[1]
    out, leaves = compare_head.call(inputs, spec, kernel)
    out.logp.backward(g)
    # Half a unit of the last place, of subnormal numbers too: the only rounding there should be.
    for name, leaf in leaves.items():
        off = (leaf.grad.double() - want[name]).abs()
        limit = 2 * torch.finfo(torch.float16).eps * want[name].abs().max() + 2.0**-24
        assert float(off.max()) <= float(limit), name


def test_checkpointing_recomputes_the_same(kernel: str) -> None:
    """Non-reentrant activation checkpointing around the loss."""
    case = compare_whole.on_leaves(LossSpec(bias=True).make())
    want = gradients(compare_whole.call(case, kernel).loss, case)

    def run(*leaves: Tensor) -> Tensor:
        return compare_whole.call(case | dict(zip(LEAVES, leaves, strict=True)), kernel).loss

    loss = checkpoint(run, *(case[name] for name in LEAVES), use_reentrant=False)
    assert_equal(gradients(loss, case), want)


def test_inputs_changed_in_place_are_noticed(kernel: str) -> None:
    inputs, leaves = head_case()
    loss = head(inputs, kernel)
    with torch.no_grad():
        leaves[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_options_travel_as_they_are() -> None:
    """The string makes the same options again, also of whole numbers, None and numpy's numbers."""
    config = RomaConfig(clip_low=np.float32(0.25), dual_clip=None, main=None, max_length=7)
    assert decoded(config.encoded()) == config and type(config.clip_low) is float
    case = compare_logp.on_leaves(LossSpec(config=config).make_logp())
    assert torch.isfinite(compare_logp.call(case, "triton").loss)
