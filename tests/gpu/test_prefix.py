"""Variable-length attention of packed groups on a card, against sdpa by shapes and a mask in fp64.

On the CPU a stand-in of the documented semantics takes its place: `tests/models` has the rest.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.varlen import Varlen
from torch import Tensor
from torch.nn.attention import varlen

from roma.models.prefix import Group, pack, share_prompts
from roma.models.prefix import attention as prefix_attention
from roma.models.prefix.attention import Segments

# Flash attention rounds scores' weights, outputs and gradients to the dtype once, as sdpa does with
# a mask; it adds in another order. Twice what sdpa loses, as for every kernel here.
LOSS = 2.0


@pytest.fixture
def attend(device: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of variable-length attention, the real one on a card."""
    calls: list[Any] = []
    real = varlen.varlen_attn if device == "cuda" else Varlen().of_2_13

    def counted(*tensors: Any, enable_gqa: bool = False, **options: Any) -> Any:
        calls.append(tensors)
        more = {"enable_gqa": True} if enable_gqa else {}
        return real(*tensors, **options, **more)

    def counted_2_11(*tensors: Any, **options: Any) -> Any:
        calls.append(tensors)
        return real(*tensors, **options)

    new = prefix_attention._has_gqa(real)
    monkeypatch.setattr(varlen, "varlen_attn", counted if new else counted_2_11)
    return calls


def segments(device: str, seed: int = 0) -> Segments:
    """Prompts of 1 to 300 tokens (on the CPU: 20), rollouts of 1 to 200 (20), and one of none."""
    draw = random.Random(seed)
    prompt, long = (300, 200) if device == "cuda" else (20, 20)
    sizes = [1, *(draw.randint(2, prompt) for _ in range(4))]
    lengths = torch.tensor([1, 2, *(draw.randint(1, long) for _ in range(22))])
    tokens = torch.ones(24, int(lengths.max()), dtype=torch.int64, device=device)
    groups = [Group(0, p, tuple(range(6 * p, 6 * p + 6))) for p in range(4)]
    groups += [Group(1, 4, tuple(range(9))), Group(1, 2, ())]
    ids = [torch.ones(size, dtype=torch.int64, device=device) for size in sizes]
    return pack(ids, tokens, lengths, groups).segments


def tensors(device: str, size: int, heads: tuple[int, int], depth: int) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    return [
        torch.randn(size, h, depth, generator=generator, device=device).bfloat16()
        for h in (heads[0], heads[1], heads[1])
    ]


def results(run: Any, given: list[Tensor], shared: Segments) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out = run(*leaves, shared, None)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def lost(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the output and each gradient: the error's share of the norm, and the largest one."""
    pairs = list(zip(found, exact, strict=True))
    shares = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return shares + [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("heads", "depth"),
    [((4, 4), 64), ((8, 2), 128), ((4, 1), 24), ((2, 1), 256)],
    ids=["all", "grouped", "one of 24", "one of 256"],
)
def test_it_is_sdpa_by_shapes(
    device: str, attend: list[Any], heads: tuple[int, int], depth: int
) -> None:
    shared = segments(device)
    given = tensors(device, shared.size, heads, depth)
    # By shapes in fp64 the CPU's tests hold to a mask over the row.
    exact = results(prefix_attention._by_shape, [x.double() for x in given], shared)
    theirs = lost(results(prefix_attention._by_shape, given, shared), exact)
    mine = lost(results(prefix_attention._by_varlen, given, shared), exact)
    (call,) = attend
    assert call[1].shape[1] == heads[1] and call[3].dtype == call[4].dtype == torch.int32
    assert prefix_attention._varlen_takes(given[0], given[2]) == (device == "cuda")
    bound = [LOSS * x + 2 * 2**-9 for x in theirs]
    assert all(a <= b for a, b in zip(mine, bound, strict=True)), (mine, theirs)
    # The bound bites: keys that are their neighbours'.
    q, k, v = (x.double() for x in given)
    wrong = lost(results(prefix_attention._by_shape, [q, k.roll(1, 0), v], shared), exact)
    assert all(a > 10 * b for a, b in zip(wrong[:3], bound, strict=False)), (wrong, bound)


@pytest.mark.usefixtures("as_users", "attend")
def test_two_runs_are_equal(device: str) -> None:
    """Where deterministic algorithms are asked for, not warnings alone."""
    torch.use_deterministic_algorithms(True)
    shared = segments(device, seed=1)
    given = tensors(device, shared.size, (8, 2), 64)
    runs = [results(prefix_attention._by_varlen, given, shared) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.usefixtures("as_users", "device")
def test_a_model_under_autocast_takes_it(attend: list[Any]) -> None:
    """Qwen3's norms give fp32 queries beside bf16 values; a row per rollout is what is meant."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen3Config(vocab_size=64, initializer_range=0.1, **size, **heads)
        model = transformers.Qwen3ForCausalLM(config).cuda().eval()
    prompts = [torch.randint(1, 64, (n,), device="cuda") for n in (5, 70)]
    tokens = torch.randint(1, 64, (6, 40), device="cuda")
    lengths = torch.tensor([40, 1, 7, 40, 33, 2])
    row = pack(prompts, tokens, lengths, [Group(0, 0, (0, 1, 2)), Group(0, 1, (5, 4, 3))])
    reads = row.reads([(0, i) for i in range(6)])

    def rows() -> Tensor:
        made = []
        for i, n in enumerate(lengths.tolist()):
            prompt = prompts[i // 3]
            ids = torch.cat([prompt, tokens[i, : n - 1]])[None]
            made.append(model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
        return torch.cat(made)

    def gradient(states: Tensor) -> Tensor:
        model.zero_grad()
        weights = torch.linspace(-1, 1, states.numel(), device="cuda").view_as(states)
        (states.float() * weights).sum().backward()
        found = [w.grad.flatten() for w in model.model.parameters()]
        return torch.cat([states.detach().float().flatten(), *found])

    exact = gradient(rows())
    with torch.autocast("cuda", torch.bfloat16):
        theirs = rows()
    by_rows = float((gradient(theirs) - exact).norm())
    share_prompts(model)
    with torch.autocast("cuda", torch.bfloat16):
        mine = model.model(**row.inputs(), use_cache=False).last_hidden_state[0][reads]
    assert len(attend) == size["num_hidden_layers"] and attend[0][0].dtype == torch.bfloat16
    assert float((gradient(mine) - exact).norm()) <= 1.5 * by_rows
