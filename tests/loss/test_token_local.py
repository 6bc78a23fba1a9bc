"""The token-local path: gradients while a chunk's logits are at hand, (K+1) + 2A products."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.library import opcheck

import roma
from roma import RomaConfig
from roma.testing import ProductCount, compare_logp, compare_whole, count_products, tolerance
from roma.testing.strategies import LossSpec, configs, loss_specs
from roma_kernels.roma_loss.token_local import op

TOKEN = RomaConfig(worst_over="token")


def in_chunks(rows: int, spec: LossSpec) -> dict[str, Any]:
    """Arguments of a triton call whose workspace holds `rows` rows of logits."""
    by_row = spec.v * (4 + spec.dtype.itemsize)
    return {"backend": "triton", "workspace": rows * by_row}


def counted(case: dict[str, Any], **how: Any) -> ProductCount:
    with count_products() as count:
        loss = functools.partial(roma.roma_loss, **how)
        compare_whole.call(case, loss).loss.backward()
    return count


def active_rows(case: dict[str, Any]) -> int:
    """Rows with a coefficient, by the reference."""
    scored = compare_whole.call(case, "reference")
    pairs = {"logp": scored.logp, "view_logp": scored.view_logp}
    leaves = compare_logp.on_leaves({**case, **pairs})
    for name in ("hidden", "view_hidden", "weight", "bias", "tokens"):
        leaves.pop(name)
    compare_logp.call(leaves, "reference").loss.backward()
    return sum(int((leaves[name].grad != 0).sum()) for name in compare_logp.LOGPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_no_recompute(dtype: torch.dtype, packed: bool) -> None:
    spec = LossSpec(b=6, t=20, k=4, v=257, dtype=dtype, packed=packed, config=TOKEN, bias=True)
    case = compare_whole.on_leaves(spec.make())
    case["correct"] = torch.arange(6) % 2 == 0
    count = counted(case, backend="triton")
    tokens, active = int(case["mask"].sum()), active_rows(case)
    assert count.rows("forward", 257) == tokens * 5
    assert count.rows("dhidden", 257) == count.rows("dweight", 257) == active < tokens * 5
    assert count.flop == 2 * 257 * spec.d * (tokens * 5 + 2 * active)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"dtype": torch.float16}, {}),  # would underflow before a loss scale arrives
        ({"config": RomaConfig()}, {}),  # a sequence's worst view is known at its end
        ({"config": replace(TOKEN, ratio_level="sequence")}, {}),  # and so is its ratio
        ({"config": replace(TOKEN, main="vespo")}, {}),
        ({"config": replace(TOKEN, entropy_coef=0.1)}, {}),  # the row kernel has no entropies
        ({"config": RomaConfig(gate_tau=1.0), "k": 1}, {}),  # a weight is known at the end
        ({"t": 60}, {"workspace": 1}),  # chunks of a token: dW's traffic
    ],
)
def test_where_it_is_not_taken(changes: dict[str, Any], how: dict[str, Any]) -> None:
    spec = LossSpec(**({"b": 6, "t": 20, "k": 4, "v": 257, "config": TOKEN} | changes))
    count = counted(compare_whole.on_leaves(spec.make()), backend="triton", **how)
    assert count.rows("recompute", 257) > 0


def test_no_gradient_no_product() -> None:
    case = LossSpec(b=6, t=20, k=4, v=257, config=TOKEN).make()
    with count_products() as count:
        compare_whole.call(case, "triton")
    rows = int(case["mask"].sum()) * 5
    assert count.rows("dhidden", 257) == count.rows("dweight", 257) == 0
    assert rows <= count.rows("forward", 257) <= rows + 128


@given(
    spec=loss_specs(
        config=(
            configs(worst_over="token") | configs(worst_over="mean") | configs(lambda_inv=0.0)
        ).filter(lambda config: config.local and not config.gates)
    ),
    rows=st.integers(1, 40),
)
@example(spec=LossSpec(v=129, k=4, packed=True, difficulty="nan_when_masked", config=TOKEN), rows=5)
@example(spec=LossSpec(k=0, config=RomaConfig(lambda_inv=0, softcap=5.0, temperature=0.7)), rows=3)
@example(spec=LossSpec(k=1, dtype=torch.bfloat16, bias=True, config=RomaConfig()), rows=4)
def test_values_and_gradients_in_chunks(spec: LossSpec, rows: int) -> None:
    """Chunks of one token up to all at once, whose ends cut sequences anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "LEAST_ROWS", 1)
        compare_whole.check_against_oracle(
            spec, functools.partial(roma.roma_loss, **in_chunks(rows, spec))
        )


@pytest.mark.parametrize(
    "frozen", [("weight",), ("bias",), ("hidden", "view_hidden"), ("view_hidden",), ("hidden",)]
)
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    spec = LossSpec(b=4, t=6, k=3, v=129, bias=True, config=TOKEN)
    compare_whole.check_against_oracle(spec, "triton", frozen)
    case = compare_whole.on_leaves(spec.make(), frozen=frozen)
    count = counted(case, backend="triton")
    assert (count.rows("dweight", 129) == 0) == ("weight" in frozen)
    assert (count.rows("dhidden", 129) == 0) == ("view_hidden" in frozen and "hidden" in frozen)


def test_operator_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, aliasing, fake tensors and autograd, as PyTorch's own checker sees them."""
    seen: list[tuple[Any, Any]] = []
    original = op.token_local_loss_op

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments, options))
        return original(*arguments, **options)

    monkeypatch.setattr(op, "token_local_loss_op", watch)
    for spec in (LossSpec(config=TOKEN, bias=True), LossSpec(k=1, packed=True, aux=False)):
        compare_whole.call(compare_whole.on_leaves(spec.make()), "triton")
        opcheck(original, *seen.pop())


@pytest.mark.parametrize("both", [False, True])
def test_the_log_probs_are_differentiable(both: bool) -> None:
    """A trainer's own objective on them, alone or beside the loss, as on any back end."""
    grads = []
    for backend in ("triton", "torch"):
        spec = LossSpec(b=3, t=6, k=2, v=129, bias=True, config=TOKEN)
        case = compare_whole.on_leaves(spec.make())
        out = compare_whole.call(case, backend)
        own = (out.logp * out.logp.detach()).sum() + out.view_logp[1].square().sum()
        leaves = [case[name] for name in compare_whole.LEAVES]
        grads.append(torch.autograd.grad(own + out.loss if both else own, leaves))
    for mine, theirs in zip(*grads, strict=True):
        assert float((mine - theirs).abs().max()) <= tolerance.many(float(theirs.abs().max()))


def test_two_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LEAST_ROWS", 1)
    spec = LossSpec(b=4, t=9, k=3, v=129, bias=True, dtype=torch.bfloat16, config=TOKEN)
    loss = functools.partial(roma.roma_loss, **in_chunks(16, spec))
    runs = []
    for _ in range(2):
        case = compare_whole.on_leaves(spec.make())
        got = compare_whole.call(case, loss)
        got.loss.backward()
        runs.append([got.loss, got.logp, *(case[name].grad for name in compare_whole.LEAVES)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
