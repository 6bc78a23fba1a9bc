"""A head split over two ranks: the same numbers as the whole head on one, gradients included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import RANKS, Ranks

import roma
from roma import RomaConfig
from roma.testing import compare_head, compare_whole, tolerance
from roma.testing.strategies import HeadSpec, LossSpec


def _start(rank: int, store: str) -> dist.ProcessGroup:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from support import interpreter

        interpreter.repair()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    return dist.group.WORLD


def _stop() -> None:
    dist.barrier()  # a rank that goes while the other still listens takes it down, now and then
    dist.destroy_process_group()


def _head(rank: int, store: str, kernel: str) -> None:
    group = _start(rank, store)
    for spec in (
        HeadSpec(shape=(17,), v=258, bias=True, entropy=True, softcap=5.0, temperature="rows"),
        HeadSpec(shape=(3, 2), v=2, dtype=torch.bfloat16),
        HeadSpec(shape=(5,), v=130, difficulty="peaked_tail", entropy=True),
        HeadSpec(shape=(5,), v=130, difficulty="below_zero"),
        HeadSpec(shape=(2, 0, 3), v=130, entropy=True),  # no position at all
    ):
        inputs, upstream = spec.make(), compare_head.draw_upstream(spec)
        want, want_grad = compare_head.run_oracle(inputs, upstream, torch.float64)
        eager, eager_grad = compare_head.run_oracle(inputs, upstream, torch.float32)
        mine = slice(rank * spec.v // RANKS, (rank + 1) * spec.v // RANKS)
        leaves = {"hidden": inputs["hidden"], "weight": inputs["weight"][mine]}
        if spec.bias:
            leaves["bias"] = inputs["bias"][mine]
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        out = roma.linear_logprob(
            **inputs | leaves, entropy=spec.entropy, vocab_group=group, backend=kernel
        )
        compare_head.backward(out, upstream)
        scale = compare_head.row_scale(inputs)
        flat = inputs["hidden"].reshape(-1, spec.d)
        noise = tolerance.logp_noise(want, flat, inputs["weight"], scale, spec.dtype)
        for name in ("logp", "lse", "entropy")[: 3 if spec.entropy else 2]:
            got, how = getattr(out, name).reshape(-1), {"dtype": torch.float32, "noise": noise}
            tolerance.check(name, got, getattr(want, name), getattr(eager, name), **how)
            everywhere = [torch.empty_like(got) for _ in range(RANKS)]
            dist.all_gather(everywhere, got.detach())
            assert torch.equal(*everywhere), f"{name} differs between ranks"
        dz = tolerance.dlogits(
            want, inputs["tokens"].reshape(-1), upstream["logp"].reshape(-1),
            upstream["entropy"].reshape(-1) if spec.entropy else 0.0, 0.0, noise,
            scale=scale, softcap=spec.softcap, dtype=spec.dtype,
        )  # fmt: skip
        ones = torch.ones(len(flat), 1)
        noises = {
            "hidden": tolerance.dhidden_noise(dz, inputs["weight"], spec.dtype),
            "weight": tolerance.dweight_noise(dz, flat, spec.dtype)[mine],
            "bias": tolerance.dweight_noise(dz, ones, spec.dtype)[mine, 0],
        }
        for name, leaf in leaves.items():
            part = slice(None) if name == "hidden" else mine
            tolerance.check(
                f"d{name}", leaf.grad.reshape(want_grad[name][part].shape), want_grad[name][part],
                eager_grad[name][part], dtype=leaf.dtype, noise=noises[name],
            )  # fmt: skip
    _stop()


def _loss(rank: int, store: str, kernel: str) -> None:
    group = _start(rank, store)
    for config in (RomaConfig(), RomaConfig(worst_over="token", ref_coef=0.1)):
        case = compare_whole.on_leaves(LossSpec(b=3, t=5, k=3, v=130, config=config).make())
        whole = compare_whole.call(case, "reference")
        whole.loss.backward()
        mine = slice(rank * 65, (rank + 1) * 65)
        part = compare_whole.on_leaves(case | {"weight": case["weight"].detach()[mine]})
        out = compare_whole.call(part | {"vocab_group": group}, kernel)
        out.loss.backward()
        slack = tolerance.many(1 + abs(float(whole.loss.detach())))
        assert abs(float(out.loss.detach() - whole.loss.detach())) <= slack
        assert torch.equal(out.worst_view, whole.worst_view)
        for name in ("hidden", "view_hidden", "weight"):
            want = case[name].grad[mine] if name == "weight" else case[name].grad
            off = float((part[name].grad - want).abs().max())
            assert off <= tolerance.many(float(case[name].grad.abs().max())), name
    _stop()


def _uneven(rank: int, store: str, kernel: str) -> None:
    group = _start(rank, store)
    inputs = HeadSpec(v=9).make()
    inputs["weight"] = inputs["weight"][:5] if rank == 0 else inputs["weight"][5:]
    inputs["tokens"] = inputs["tokens"].clamp(max=3)
    with pytest.raises(ValueError, match=r"weight: expected equal slices .*\[5, 4\]"):
        roma.linear_logprob(**inputs, vocab_group=group, backend=kernel)
    with pytest.raises(ValueError, match="vocab_group: expected None"):
        roma.linear_logprob(**inputs, vocab_group=group, backend="reference")
    _stop()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("part", [_head, _loss, _uneven], ids=lambda f: f.__name__.strip("_"))
def test_two_ranks(part, kernel: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(part, str(tmp_path / "store"), kernel)


def test_what_ends_a_rank_fails_the_test() -> None:
    ranks = Ranks()
    with pytest.raises(AssertionError, match="IndexError"):
        ranks.run(["of rank 0"].__getitem__)
    with pytest.raises(AssertionError, match="without a word"):
        ranks.run(os._exit)
    ranks.run(abs)
    ranks.stop()
