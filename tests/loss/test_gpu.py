"""What only a GPU of compute capability 8+ can show.

    PYTHONPATH=.:kernels python -m pytest tests -m gpu

The same properties as everywhere, on the compiled kernels; then what the interpreter cannot show:
tensor descriptors, a head of full size, CUDA graphs, waits, memory, bitwise repetition, Inductor.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import candidate, check_backend, compare_head, compare_whole, count_products
from roma.testing.strategies import DTYPES, HeadSpec, LossSpec
from roma.views import CORRUPTIONS, operators
from roma_kernels.linear_logprob.triton import configs

pytestmark = pytest.mark.gpu

PUBLIC = {f.__name__: f for f in (roma.linear_logprob, roma.roma_loss, roma.roma_loss_from_logp)}


def there(name: str, **how: Any) -> Any:
    """A public function on the GPU, for tensors that come from the CPU and go back."""
    return candidate.on_device(functools.partial(PUBLIC[name], backend="triton", **how), "cuda")


def cuda(case: dict[str, Any]) -> dict[str, Any]:
    """The case on the GPU, with fresh leaves."""
    moved = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in case.items()}
    return compare_whole.on_leaves(moved)


def run(case: dict[str, Any], **how: Any) -> tuple[Any, list[Tensor]]:
    out = compare_whole.call(case, functools.partial(roma.roma_loss, backend="triton", **how))
    leaves = [case[name] for name in compare_whole.LEAVES if case[name] is not None]
    return out, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", PUBLIC)
def test_values_and_gradients(op: Any, dtype: torch.dtype) -> None:
    """Fewer examples than in the interpreter: each new set of options is compiled first."""
    function = functools.partial(PUBLIC[op], backend="triton")
    check_backend(function, op=op, dtypes=[dtype], device="cuda", examples=40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("options", [False, True])
def test_tensor_descriptors(dtype: torch.dtype, rows: int, options: bool) -> None:
    """Rows of 16 bytes, ragged in every axis."""
    spec = HeadSpec(
        shape=(rows,), d=200, v=1544, dtype=dtype, bias=options, entropy=options,
        softcap=5.0 if options else None, temperature="rows" if options else "one",
    )  # fmt: skip
    inputs = spec.make()
    tile = configs.tile_for(torch.device("cuda"), dtype, rows, softcap_or_entropy=options)
    described, _, _ = configs.sources(tile, inputs["hidden"].cuda(), inputs["weight"].cuda())
    assert described == tile.descriptors
    compare_head.check_against_oracle(spec, there("linear_logprob"))


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_a_head_of_full_size(worst_over: str) -> None:
    """D = 4096, V = 151,936, bf16, 5 × 64 rows, against float64 on the GPU.

    A bf16 gradient whose dlogits were rounded to bf16 is off by two roundings of at most 2⁻⁸: 0.8 %
    of its norm.
    """
    k, tokens, d, v = 4, 64, 4096, 151_936
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    weight = normal(v, d).bfloat16()
    hidden = (normal(2, tokens // 2, d) * (5.3 / d**0.5)).bfloat16()
    views = (hidden.float() + 1e-3 * normal(k, *hidden.shape) * hidden.float().std()).bfloat16()
    labels = torch.randint(v, (2, tokens // 2), generator=generator, device="cuda")
    case = {
        "hidden": hidden, "view_hidden": views, "weight": weight, "tokens": labels, "bias": None,
        "mask": torch.ones_like(labels, dtype=torch.bool),
        "advantages": torch.tensor([1.0, -1.0], device="cuda"),
        "correct": torch.tensor([True, False], device="cuda"),
        "aux_view": torch.tensor([0, 3], device="cuda"),
        "old_logp": torch.full(labels.shape, -20.0, device="cuda"),
        "config": RomaConfig(worst_over=worst_over, log_ratio_clamp=100.0),
    }  # fmt: skip
    out, grads = run(compare_whole.on_leaves(case), workspace=2**31)

    def exact(states: Tensor) -> Tensor:
        logits = states.reshape(-1, d).double() @ weight.double().T
        target = logits.gather(1, labels.reshape(-1, 1).repeat(len(logits) // tokens, 1))[:, 0]
        return (target - logits.logsumexp(1)).reshape(states.shape[:-1])

    with torch.no_grad():
        want, want_views = exact(hidden), torch.stack([exact(view) for view in views])
    off = torch.cat([(out.logp - want)[None], out.view_logp - want_views]).abs()
    assert float(off.square().mean().sqrt()) <= 3e-6 and float(off.max()) <= 3e-5

    leaves = [x.detach().requires_grad_() for x in (want, want_views)]
    constants = {n: case[n] for n in ("mask", "advantages", "correct", "aux_view", "old_logp")}
    loss = roma.roma_loss_from_logp(
        *(x.float() for x in leaves), **constants, config=case["config"], backend="torch"
    ).loss
    slopes = torch.autograd.grad(loss, leaves)
    states = torch.cat([hidden[None], views]).reshape(-1, d)
    g = torch.cat([slopes[0][None], slopes[1]]).reshape(-1).double()
    active = g.nonzero()[:, 0]
    logits = states[active].double() @ weight.double().T
    dz = -logits.softmax(1) * g[active, None]
    every = labels.reshape(-1).repeat(k + 1)[active]
    dz[torch.arange(len(active), device="cuda"), every] += g[active]
    dstates = torch.zeros(states.shape, dtype=torch.float64, device="cuda")
    dstates[active] = dz @ weight.double()
    dviews = dstates.reshape(k + 1, *hidden.shape)
    truth = [dviews[0], dviews[1:], dz.T @ states[active].double()]
    for name, got, right in zip(("hidden", "views", "weight"), grads, truth, strict=True):
        assert float((got.double() - right).norm() / right.norm()) <= 2 * 2**-8, name


def test_two_runs_are_bitwise_equal() -> None:
    spec = LossSpec(b=8, t=40, k=4, d=256, v=4000, dtype=torch.bfloat16, bias=True)
    first, second = (run(cuda(spec.make())) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def test_the_forward_does_not_wait() -> None:
    case = cuda(LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True, dtype=torch.bfloat16).make())
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compare_whole.call(case, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph() -> None:
    """Captured once, replayed on other numbers, other masks and other active rows."""
    specs = [LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True, seed=seed) for seed in range(3)]
    cases = [cuda(spec.make()) for spec in specs]
    static = cuda(specs[0].make())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run(static)
    for case in cases:
        with torch.no_grad():
            for name, value in case.items():
                if isinstance(value, Tensor):
                    static[name].copy_(value)
        graph.replay()
        want, want_grads = run(case)
        assert torch.equal(out.loss, want.loss) and torch.equal(out.worst_view, want.worst_view)
        for mine, theirs in zip(grads, want_grads, strict=True):
            # Inactive rows take part as zeros: other sums of the same terms.
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_inductor() -> None:
    case = cuda(LossSpec(b=4, t=9, k=3, d=64, v=257, bias=True, dtype=torch.bfloat16).make())
    want, want_grads = run(case)
    got, grads = torch.compile(lambda: run(case), fullgraph=False)()
    assert torch.equal(got.loss, want.loss)
    for mine, theirs in zip(grads, want_grads, strict=True):
        assert torch.equal(mine, theirs)
    loss = torch.compile(lambda **x: compare_whole.call(x, "auto").loss, fullgraph=True)
    assert torch.equal(loss(**case), want.loss)


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_memory(worst_over: str) -> None:
    """K = 4, 2048 tokens, V = 151,936: ≤ inputs, fp32 gradients, workspace and partial sums."""
    k, b, t, d, v, workspace = 4, 8, 256, 1024, 151_936, 2**29
    config = RomaConfig(worst_over=worst_over)
    spec = LossSpec(b=b, t=t, k=k, d=d, v=v, dtype=torch.bfloat16, config=config)
    case = cuda(spec.make())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with count_products() as count:
        run(case, workspace=workspace)
    extra = torch.cuda.max_memory_allocated() - before
    rows = (k + 1) * b * t
    inputs, gradients = 2 * (rows + v) * d, 4 * (rows + v) * d
    partial_sums = 2 * 4 * min(rows, 16_384) * (v // 128 + 1)
    assert extra <= inputs + gradients + workspace + partial_sums + 256 * rows
    assert count.rows("dhidden", v) < rows / 2


@pytest.mark.parametrize(
    "name", [*sorted(operators.NOISES), *sorted(operators.IN_PYTORCH - {"zoom_blur"})]
)
def test_views_in_pytorch_are_the_cpus(name: str) -> None:
    """To the bit: the noise by its definition, the others sum in one order."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (h, w, 3), generator=draw).byte() for h, w in ((64, 91), (5, 1))]
    parameters, seeds = [CORRUPTIONS[name].parameter(2)] * 2, [5, 2**64 - 1]
    degraded = operators.OPERATORS[name]([x.cuda() for x in images], parameters, seeds)
    for found, want in zip(
        degraded, operators.OPERATORS[name](images, parameters, seeds), strict=True
    ):
        assert torch.equal(found.cpu(), want)
