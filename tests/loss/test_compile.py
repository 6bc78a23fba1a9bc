"""The whole loss under torch.compile with Inductor, as a user compiles it, and without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import without_values
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import roma
from roma import RomaConfig
from roma.testing import compare_logp, compare_whole, tolerance
from roma.testing.strategies import LossSpec

WORST_OVER = ("sequence", "token", "batch", "mean")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test compiles for itself."""
    torch._dynamo.reset()
    yield


def assert_same(got: Any, want: Any, case: dict[str, Any], leaves: tuple[str, ...]) -> None:
    """Loss, metrics, choice and every gradient, bit by bit."""
    assert torch.equal(got.loss, want.loss) and torch.equal(got.worst_view, want.worst_view)
    for name, value in want.metrics.items():
        assert torch.equal(got.metrics[name], value), name
    inputs = [case[name] for name in leaves if case[name] is not None]
    pairs = zip(*(torch.autograd.grad(out.loss, inputs) for out in (got, want)), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("worst_over", WORST_OVER)
def test_inductor_equals_eager(worst_over: str, kernel: str) -> None:
    """K = 1, 2, 4 and four batch shapes through one compiled function."""
    config = RomaConfig(worst_over=worst_over)
    compiled = torch.compile(lambda **case: compare_whole.call(case, kernel), fullgraph=True)
    shapes = [(3, 5), (2, 4), (4, 7), (1, 6)]
    for k, (b, t) in [(1, shapes[0]), (4, shapes[0]), *((2, shape) for shape in shapes)]:
        spec = LossSpec(b=b, t=t, k=k, v=129, bias=True, config=config)
        case = compare_whole.on_leaves(spec.make())
        want = compare_whole.call(case, kernel)
        assert_same(compiled(**case), want, case, compare_whole.LEAVES)


@pytest.mark.parametrize("packed", [False, True])
def test_inductor_from_log_probs(packed: bool, kernel: str) -> None:
    compiled = torch.compile(lambda **case: compare_logp.call(case, kernel), fullgraph=True)
    for k in (1, 2, 4):
        case = compare_logp.on_leaves(LossSpec(k=k, packed=packed).make_logp())
        want = compare_logp.call(case, kernel)
        assert_same(compiled(**case), want, case, compare_logp.LOGPS)


def count_compilations(function: Callable[..., Any], calls: list[dict[str, Any]]) -> int:
    """Runs the calls through one compiled function, each held to eager; how often it compiled."""
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for call in calls:
        assert torch.equal(compiled(**call).loss, function(**call).loss)
    return counter.frame_count


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_changing_lambda_does_not_recompile(kind: str) -> None:
    case = LossSpec(bias=True).make()
    values = [0.1 + 0.3 * step for step in range(20)]
    weights = values if kind == "number" else list(map(torch.tensor, values))
    configs = [RomaConfig(lambda_inv=w, lambda_aux=w, gate_bound=w) for w in weights]
    calls = [case | {"config": config} for config in configs]
    assert count_compilations(lambda **x: compare_whole.call(x, "auto"), calls) <= 2


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
def test_changing_totals_do_not_recompile(kind: Callable[[float], Any]) -> None:
    case = LossSpec(bias=True).make()
    calls = [
        case | {"total_sequences": kind(50 + step), "total_tokens": kind(90 + 2 * step)}
        for step in range(20)
    ]
    assert count_compilations(lambda **x: compare_whole.call(x, "auto"), calls) <= 2


def test_options_may_be_built_inside() -> None:
    case = LossSpec().make()
    del case["config"]

    def loss(lambda_inv: Tensor, **rest: Any) -> Any:
        config = RomaConfig(lambda_inv=lambda_inv, worst_over="token")
        return roma.roma_loss(config=config, **rest)

    calls = [case | {"lambda_inv": torch.tensor(weight)} for weight in (0.5, 2.0)]
    assert not torch.equal(loss(**calls[0]).loss, loss(**calls[1]).loss)
    assert count_compilations(loss, calls) == 1


def test_a_lambda_as_a_tensor_is_the_number() -> None:
    case = compare_whole.on_leaves(LossSpec(bias=True).make())
    number = compare_whole.call(case | {"config": RomaConfig(lambda_inv=0.3)}, "torch")
    config = RomaConfig(lambda_inv=torch.tensor(0.3), lambda_aux=torch.tensor(0.5))
    assert_same(compare_whole.call(case | {"config": config}, "torch"), number, case, LEAVES)


LEAVES = compare_whole.LEAVES


def test_the_reference_breaks_the_graph() -> None:
    """It compiles around itself; with fullgraph the error names the way out."""
    case = LossSpec().make()
    want = compare_whole.call(case, "reference").loss
    compiled = torch.compile(lambda **x: compare_whole.call(x, "reference").loss)
    assert torch.equal(compiled(**case), want)


@pytest.mark.parametrize("device", without_values.DEVICES)
def test_shapes_without_values(device: str) -> None:
    """Meta tensors and FakeTensorMode: for memory planners and exporters."""
    case = LossSpec(k=2, bias=True).make()
    assert without_values.shapes(case, device) == without_values.shapes(case)


def test_bad_values_stop_a_compiled_loss(kernel: str) -> None:
    """A graph cannot say which value is bad, but it does not run on, and says how to learn it."""
    case = LossSpec().make()
    compiled = torch.compile(lambda **x: compare_whole.call(x, kernel).loss, fullgraph=True)
    compiled(**case)
    case["tokens"] = case["tokens"].masked_fill(case["mask"], -100)
    with pytest.raises(RuntimeError, match=r"outside torch\.compile"):
        compiled(**case)
    with pytest.raises(ValueError, match="tokens: expected ids in 0"):
        compare_whole.call(case, kernel)


def test_two_lambdas_are_two_losses() -> None:
    """The options that the operator keeps do not hold the lambdas: each call has its own."""
    case = LossSpec().make()
    losses = [
        compare_whole.call(case | {"config": replace(RomaConfig(), lambda_inv=w)}, "torch").loss
        for w in (0.5, 1.0, 2.0)
    ]
    bend = (losses[2] - losses[1]) - 2 * (losses[1] - losses[0])
    assert abs(float(bend)) <= tolerance.few(float(losses[2].abs()))
    assert not torch.equal(losses[1], losses[0])


def test_every_argument_given(kernel: str) -> None:
    """No constant is None: torch.library then sees a list of tensors, another kind of argument."""
    config = RomaConfig(
        main="sapo", ratio_level="sequence", ref_coef=0.1, ref_unbiased=True, aux_old="view",
        gate_bound=torch.tensor(0.2), gate_tau=1.0,
    )  # fmt: skip
    spec = LossSpec(bias=True, totals="tensor", weights="token", config=config)
    case = compare_whole.on_leaves(spec.make())
    compare_whole.check_against_oracle(spec, kernel)
    compiled = torch.compile(lambda **x: compare_whole.call(x, kernel), fullgraph=True)
    assert_same(compiled(**case), compare_whole.call(case, kernel), case, LEAVES)


def test_a_transposed_head(kernel: str) -> None:
    """Tied embeddings kept as [D, V]: the gradient's strides are what the operator declares."""
    config = RomaConfig(worst_over="token")
    case = LossSpec(bias=True, config=config).make()
    case = compare_whole.on_leaves(case | {"weight": case["weight"].T.contiguous().T})
    assert case["weight"].stride() != case["weight"].contiguous().stride()
    compiled = torch.compile(lambda **x: compare_whole.call(x, kernel), fullgraph=True)
    assert_same(compiled(**case), compare_whole.call(case, kernel), case, LEAVES)


@pytest.mark.parametrize("backend", ["typo", "native"])
def test_a_wrong_back_end_is_named(backend: str) -> None:
    case = LossSpec().make_logp()
    case = {n: x.double() if n.endswith("logp") and x is not None else x for n, x in case.items()}
    compiled = torch.compile(lambda **x: compare_logp.call(x, backend).loss)
    with pytest.raises(ValueError, match=r"^backend: expected one .*use 'auto'"):
        compiled(**case)
