"""The attention of packed groups, without a model: against a mask over the row, and its cost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import prefix
from support.prefix import Case
from support.varlen import Varlen
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from roma.models.prefix import Group, pack
from roma.models.prefix import attention as prefix_attention
from roma.models.prefix.attention import Segments, attention

HEADS, SIZE = 4, 8
# A sum of n ≤ 100 products loses at most about √n · eps64 = 2e-15 of its terms' norm.
EXACT = 1e-13


def drawn(seed: int, prompts: int, longest: int, groups: int) -> Case:
    """Prompts of 1 to `longest` tokens, completions of 1 to 9, groups of up to 3 rollouts."""
    draw = random.Random(seed)
    ids = [torch.ones(draw.randint(1, longest), dtype=torch.int64) for _ in range(prompts)]
    left, made = list(range(3 * groups)), []
    for variant in range(groups):
        size = draw.randint(0, 3)
        made.append(Group(variant % 2, draw.randrange(prompts), tuple(left[:size])))
        left = left[size:]
    count = 3 * groups
    lengths = torch.tensor([draw.randint(1, 9) for _ in range(count)])
    return Case(ids, torch.ones(count, 9, dtype=torch.int64), lengths, made, torch.empty(0))


def of_row(case: Case, heads: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Queries [S, HEADS, SIZE] and keys and values [S, heads, SIZE], leaves."""
    size = segments(case).size
    generator = torch.Generator().manual_seed(size)
    shapes = {"q": (size, HEADS, SIZE), "k": (size, heads, SIZE), "v": (size, heads, SIZE)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def segments(case: Case) -> Segments:
    return pack(case.prompts, case.tokens, case.lengths, case.groups).segments


def results(attend: Any, tensors: dict[str, Tensor], shared: Any, scaling: float) -> list[Tensor]:
    """The output, and the gradients under a weight for each number."""
    out = attend(*tensors.values(), shared, scaling)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, list(tensors.values()), weights)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest share of its norm by which one of them differs."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, expected, strict=True)
    )


layouts = given(
    seed=st.integers(0, 10_000),
    prompts=st.sampled_from([1, 2, 5]),
    longest=st.sampled_from([1, 3, 9]),
    groups=st.sampled_from([1, 2, 7]),
    heads=st.sampled_from([1, 2, 4]),
)
alone = example(seed=0, prompts=1, longest=1, groups=1, heads=1)


@settings(max_examples=60)
@layouts
@alone
def test_a_mask_over_the_row(
    seed: int, prompts: int, longest: int, groups: int, heads: int
) -> None:
    """Forward and backward, by shapes and by one variable-length call, of each torch."""
    case = drawn(seed, prompts, longest, groups)
    tensors, shared = of_row(case, heads), segments(case)
    expected = results(prefix.by_mask(prefix.seen_in(case)), tensors, None, 0.3)
    assert apart(results(prefix_attention._by_shape, tensors, shared, 0.3), expected) <= EXACT
    for version in ("of_2_11", "of_2_13"):
        with standing_in(version) as stand_in:
            found = results(prefix_attention._by_varlen, tensors, shared, 0.3)
        assert apart(found, expected) <= EXACT
        (call,) = stand_in.calls
        assert call["window_size"] == (-1, 0) and call["scale"] == 0.3
        assert call["key"].shape[1] == heads  # a prompt's keys are not repeated over heads


@contextmanager
def standing_in(version: str = "of_2_13", **options: Any) -> Iterator[Varlen]:
    stand_in = Varlen(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", getattr(stand_in, version))
        yield stand_in


def test_a_window_at_the_top_left_is_found() -> None:
    case = drawn(3, 2, 9, 7)
    tensors, shared = of_row(case, 2), segments(case)
    expected = results(prefix_attention._by_shape, tensors, shared, 0.3)
    with standing_in(top_left=True):
        assert apart(results(prefix_attention._by_varlen, tensors, shared, 0.3), expected) > 0.1


class OnACard:
    """What the choice between the two ways looks at, of a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        """A tensor of heads of `size` numbers."""
        self.shape, self.dtype = (1, 1, size), dtype


@pytest.mark.parametrize(
    ("size", "values", "dtype", "capability", "hip", "taken"),
    [
        (128, 128, torch.bfloat16, (9, 0), None, True),
        (24, 24, torch.float16, (8, 0), None, True),
        (256, 256, torch.bfloat16, (12, 0), None, True),
        (128, 128, torch.float32, (9, 0), None, False),
        (128, 128, torch.float16, (7, 5), None, False),  # Turing has no such kernels
        (128, 128, torch.bfloat16, (9, 4), "7.2", False),  # ROCm: the other alignment
        (20, 20, torch.bfloat16, (9, 0), None, False),
        (264, 264, torch.bfloat16, (9, 0), None, False),
        (192, 128, torch.bfloat16, (9, 0), None, False),  # DeepSeek's values are narrower
    ],
)
def test_what_goes_to_variable_length_attention(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    values: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    hip: str | None,
    taken: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert prefix_attention._varlen_takes(OnACard(size, dtype), OnACard(values, dtype)) is taken
    assert not prefix_attention._varlen_takes(torch.ones(1, 1, 8).bfloat16(), torch.ones(1, 1, 8))


CAUSAL = SimpleNamespace(is_causal=True)


def called(case: Case, tensors: dict[str, Tensor], **options: Any) -> Tensor:
    """As transformers calls it."""
    q, k, v = (x.transpose(0, 1)[None] for x in tensors.values())
    options = {"shared": segments(case), "scaling": 0.3} | options
    module = options.pop("module", CAUSAL)
    return attention(module, q, k, v, options.pop("mask", torch.empty(1, 1, 0, 0)), **options)[0]


def test_values_of_another_size() -> None:
    case = drawn(1, 2, 9, 2)
    tensors = of_row(case, 2)
    tensors["v"] = tensors["v"][..., :5]
    expected = prefix.by_mask(prefix.seen_in(case))(*tensors.values(), None, 0.3)
    torch.testing.assert_close(called(case, tensors)[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", ["by shape", "by varlen"])
def test_autocast_reaches_it(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Norms give fp32 queries and keys beside bf16 values: all are computed in bf16, as by sdpa."""
    case = drawn(1, 2, 9, 2)
    tensors = of_row(case, 2, torch.float32)
    tensors["v"] = tensors["v"].bfloat16()
    monkeypatch.setattr(
        prefix_attention,
        "_varlen_takes",
        lambda q, _: way != "by shape" and q.dtype == torch.bfloat16,
    )
    with standing_in() as stand_in:
        with torch.autocast("cpu", torch.bfloat16):
            out = called(case, tensors)
        assert out.dtype == torch.bfloat16 and len(stand_in.calls) == (way != "by shape")
    with torch.autocast("cpu", torch.bfloat16), standing_in():
        double = {name: x.double() for name, x in tensors.items()}
        assert called(case, double).dtype == torch.float64  # autocast leaves fp64 alone
    expected = prefix.by_mask(prefix.seen_in(case))(*double.values(), None, 0.3).detach()
    # Inputs, weights and outputs rounded once each: 3 · 2⁻⁹ of the largest number.
    assert float((out[0].detach() - expected).abs().max()) <= 3 * 2**-9 * float(
        expected.abs().max() + 1
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sliding_window": 4}, "sliding_window: expected none, .* got 4; give each rollout a row"),
        ({"softcap": 30.0}, "softcap: expected none, .* got 30"),
        ({"s_aux": torch.ones(4)}, "s_aux: expected none"),
        ({"sinks": torch.ones(4)}, "sinks: expected none"),
        ({"position_bias": torch.ones(4)}, "position_bias: expected none"),
        ({"indices": torch.ones(4)}, "indices: expected none"),
        ({"is_causal": False}, "is_causal: expected True"),
        ({"module": SimpleNamespace(is_causal=False)}, "is_causal: expected True"),
        ({"dropout": 0.1}, r"attention dropout: expected 0, .* got 0.1; call model.eval\(\)"),
        ({"mask": torch.ones(1, 1, 3, 3)}, "a mask of 9 entries; pass Packed.inputs"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], words: str) -> None:
    case = drawn(1, 2, 9, 2)
    tensors = of_row(case, 2)
    called(case, tensors, sliding_window=None, is_causal=None)
    with pytest.raises(ValueError, match=words):
        called(case, tensors, **options)


def test_a_row_of_another_size() -> None:
    """A cache of keys, or a row cut in parts for several devices."""
    case = drawn(1, 2, 9, 2)
    tensors = of_row(case, 2)
    longer = tensors | {name: torch.cat([tensors[name]] * 2) for name in "kv"}
    for given_ in (longer, {name: x[1:] for name, x in tensors.items()}):
        with pytest.raises(ValueError, match=r"packed groups: expected one row of \d+ tokens"):
            called(case, given_)


# Cost -------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes, and the calls of attention."""

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.largest = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += "attention" in str(func) and "backward" not in str(func)
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def cost(groups: int, prompts: list[int], varlen_way: bool = False) -> tuple[int, Watch]:
    """Tokens of the row, and what is made on the way forward and back."""
    count = 4 * groups
    lengths = torch.arange(count) % 8 + 1
    tokens = torch.ones(count, 8, dtype=torch.int64)
    made = [Group(0, p, tuple(range(4 * p, 4 * p + 4))) for p in range(groups)]
    ids = [torch.ones(prompts[p % len(prompts)], dtype=torch.int64) for p in range(groups)]
    case = Case(ids, tokens, lengths, made, torch.empty(0))
    tensors = of_row(case, 2)
    run = prefix_attention._by_varlen if varlen_way else prefix_attention._by_shape
    with standing_in(), Watch() as watch:
        shared = segments(case)
        results(run, tensors, shared, 0.3)
    return shared.size, watch


@pytest.mark.parametrize("prompts", [[16], [15, 16, 17]], ids=["equal", "ragged"])
def test_calls_do_not_grow_with_groups(prompts: list[int]) -> None:
    """A call for each length of prompts, and for each factor of two in those of completions."""
    calls = [cost(groups, prompts)[1].calls for groups in (6, 12, 48)]
    assert calls == [4 * len(prompts)] * 3  # completions of 1, 2 to 3 and 4 to 7 tokens in the row


@pytest.mark.parametrize("varlen_way", [False, True], ids=["by shape", "by varlen"])
def test_no_tensor_grows_with_the_square_of_the_row(varlen_way: bool) -> None:
    sizes, watches = zip(*(cost(n, [16], varlen_way) for n in (32, 64)), strict=True)
    assert sizes[1] == 2 * sizes[0]
    assert watches[1].largest <= 2 * watches[0].largest
    # Keys of the completions, over all heads: at most 4 · (16 + 7) of them for 16 + 4 · 3.5 tokens.
    assert watches[1].largest <= 3.1 * sizes[1] * HEADS * SIZE < sizes[1] ** 2 / 5


def test_the_watch_sees_a_mask_over_the_row() -> None:
    case = drawn(1, 2, 9, 7)
    size = segments(case).size
    with Watch() as watch:
        prefix.by_mask(prefix.seen_in(case))(*of_row(case, 2).values(), None, 0.3)
    assert watch.largest == HEADS * size**2


def test_indices_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share them: the second call makes none."""
    case = drawn(1, 2, 9, 7)
    shared, made = segments(case), []
    for name in ("_make_kinds", "_make_varlen"):
        kept = getattr(Segments, name)

        def counted(self: Segments, device: Any, kept: Any = kept) -> Any:
            made.append(device)
            return kept(self, device)

        monkeypatch.setattr(Segments, name, counted)
    tensors = of_row(case, 2)
    with standing_in():
        for _ in range(3):
            for run in (prefix_attention._by_shape, prefix_attention._by_varlen):
                run(*tensors.values(), shared, 0.3)
    assert len(made) == 2
