"""The loss on pairs inside PyTorch: torch.compile, tensors without values, a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import without_values
from support.pairs import laid_out, needed
from torch import Tensor

from roma import RomaConfig
from roma.testing import compare_whole, count_products, tolerance
from roma.testing.strategies import LossSpec

LEAVES = compare_whole.LEAVES


def pair_case(*, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The pairs that matter, their states as leaves; the first token of all does not count.

    To its position points whatever has no meaning, and what stands there is no token.
    """
    case = LossSpec(**({"b": 4, "t": 6, "k": 3, "bias": True, "seed": seed} | changes)).make()
    case["mask"].view(-1)[:2] = torch.tensor([False, True])
    case["correct"][0] = True  # so that its pairs are there
    case["tokens"] = case["tokens"].masked_fill(~case["mask"], -100)
    laid = laid_out(case, needed(case), seed=seed)
    return compare_whole.on_leaves(laid | {"view_hidden": laid["view_hidden"].nan_to_num(7.0)})


def assert_equal(got: Any, want: Any, case: dict[str, Any]) -> None:
    """Bit by bit."""
    assert torch.equal(got.loss, want.loss) and torch.equal(got.worst_view, want.worst_view)
    assert torch.equal(got.view_logp, want.view_logp)
    leaves = [case[name] for name in LEAVES]
    pairs = zip(*(torch.autograd.grad(out.loss, leaves) for out in (got, want)), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "backend"), [(False, "torch"), (True, "triton")])
def test_inductor_equals_eager(packed: bool, backend: str) -> None:
    """Other pairs and sizes through one compiled function; around the operators all is the same."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda **case: compare_whole.call(case, backend), fullgraph=True)
    for seed, (b, t) in enumerate([(4, 6), (3, 5)]):
        case = pair_case(packed=packed, b=b, t=t, seed=seed)
        assert_equal(compiled(**case), compare_whole.call(case, backend), case)


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_one_node_an_operator(worst_over: str, kernel: str) -> None:
    """One sweep for all rows, also where dense views would take the token-local path."""
    torch._dynamo.reset()
    calls: list[str] = []

    def remember(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        calls.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module

    case = pair_case(config=RomaConfig(worst_over=worst_over))
    compiled = torch.compile(
        lambda **x: compare_whole.call(x, kernel), fullgraph=True, backend=remember
    )
    assert_equal(compiled(**case), compare_whole.call(case, kernel), case)
    ours = [call for call in calls if "roma" in call]
    assert ours == ["roma.linear_logprob.default", "roma.combine.default"]


@pytest.mark.parametrize("device", without_values.DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_without_values(packed: bool, device: str) -> None:
    """No shape depends on a value, so that on a GPU nothing waits for one."""
    case = pair_case(packed=packed)
    assert without_values.shapes(case, device) == without_values.shapes(case)


def test_a_missing_pair_stops_a_compiled_loss(kernel: str) -> None:
    torch._dynamo.reset()
    case = pair_case()
    compiled = torch.compile(
        lambda **x: compare_whole.call(x, kernel).loss, fullgraph=True, backend="aot_eager"
    )
    compiled(**case)
    case["view_rows"] = torch.full_like(case["view_rows"], -1)
    with pytest.raises(RuntimeError, match=r"outside torch\.compile"):
        compiled(**case)


def test_a_compiled_loss_computes_no_more_rows() -> None:
    """Of torch's tiles, which nothing fills up."""
    torch._dynamo.reset()
    case = pair_case()
    compiled = torch.compile(
        lambda **x: compare_whole.call(x, "torch").loss, fullgraph=True, backend="aot_eager"
    )
    compiled(**case)
    rows = int((case["mask"].sum(1) * (1 + (case["view_rows"] >= 0).sum(0))).sum())
    for loss in (compiled, lambda **x: compare_whole.call(x, "torch").loss):
        with count_products() as count:
            loss(**case)
        assert count.rows("forward", 33) == rows


def test_two_runs_are_bitwise_equal(backend: str) -> None:
    case = pair_case(dtype=torch.bfloat16)
    assert_equal(compare_whole.call(case, backend), compare_whole.call(case, backend), case)


def test_a_head_split_over_a_group(kernel: str, tmp_path: Path) -> None:
    """Of one rank: the exchange, without the processes of test_vocab_parallel.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = pair_case()
        want = compare_whole.call(case, kernel)
        got = compare_whole.call(case | {"vocab_group": dist.group.WORLD}, kernel)
        for name in ("loss", "logp", "view_logp"):
            mine, theirs = getattr(got, name).detach(), getattr(want, name).detach()
            limit = tolerance.few(1 + float(theirs.abs().max()))
            assert float((mine - theirs).abs().max()) <= limit
        assert torch.equal(got.worst_view, want.worst_view)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("joined", [True, False])
def test_states_that_are_not_contiguous(joined: bool, backend: str) -> None:
    """Slices of what a model returned, and int64 rows with a stride."""
    case = pair_case()
    want = compare_whole.call(case, backend)
    strided = dict(case)
    for name in ("hidden", "view_hidden"):
        wide = torch.cat([case[name], case[name]], dim=-1 if joined else -2)
        at = [slice(None)] * wide.ndim
        at[-1 if joined else -2] = slice(case[name].shape[-1 if joined else -2], None)
        strided[name] = wide[tuple(at)]
    strided["view_rows"] = case["view_rows"].T.contiguous().T
    assert torch.equal(compare_whole.call(strided, backend).loss, want.loss)
