"""Every plan of the Triton back end is held to the oracle, and the tuning table is data."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import roma
from roma import RomaConfig
from roma.testing import check_backend, compare_head, compare_whole, count_products, tolerance
from roma.testing.strategies import HeadSpec, LossSpec
from roma_kernels.linear_logprob.triton import tuning
from roma_kernels.linear_logprob.triton.tuning import override, plan_of, tile_of

CHUNK = "chunk.rows=32 chunk.columns=192"
VENDOR = f"plan=vendor {CHUNK}"


@pytest.mark.slow
@pytest.mark.parametrize("op", [roma.linear_logprob, roma.roma_loss], ids=lambda f: f.__name__)
def test_the_vendors_plan_against_the_oracle(op) -> None:
    with override(VENDOR):
        check_backend(functools.partial(op, backend="triton"), op=op.__name__, examples=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [False, True])
def test_the_vendors_plan_at_every_edge(dtype: torch.dtype, options: bool) -> None:
    """More rows than a chunk has, and a vocabulary of two chunks and a ragged third."""
    spec = HeadSpec(
        shape=(70,), d=33, v=2 * 192 + 7, dtype=dtype, bias=options, entropy=options,
        softcap=5.0 if options else None, temperature="rows" if options else "one",
    )  # fmt: skip
    with override(VENDOR):
        compare_head.check_against_oracle(spec, "triton")


def test_a_wrong_chunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One column short: the comparison above would say so."""
    from roma_kernels.linear_logprob.triton import vendor

    def short(sums, logits, head, rows, first):
        whole(sums, logits[:, :-1], head, rows, first)

    whole = vendor.row_sums
    monkeypatch.setattr(vendor, "row_sums", short)
    spec = HeadSpec(shape=(40,), d=33, v=391, dtype=torch.float32)
    with override(VENDOR), pytest.raises(AssertionError, match="exceeds"):
        compare_head.check_against_oracle(spec, "triton")


def test_the_vendors_plan_counts_rows_that_count() -> None:
    """Masked tokens are not multiplied: their number is read from the device."""
    case = LossSpec(b=3, t=20, k=2, d=16, v=64, difficulty="plain").make()
    case["mask"][:, 5:] = False
    with override("forward.plan=vendor"), count_products() as count:
        compare_whole.call(case, functools.partial(roma.roma_loss, backend="triton"))
    assert count.rows("forward", 64) == 3 * int(case["mask"].sum()) < case["mask"].numel()


@pytest.mark.parametrize("plan", ["triton", "vendor"])
def test_plans_give_one_dz(plan: str) -> None:
    """Forward by one, backward by the other."""
    other = "vendor" if plan == "triton" else "triton"
    spec = HeadSpec(shape=(70,), d=32, v=391, dtype=torch.float32, entropy=True)
    with override(f"forward.plan={plan} dlogits.plan={other} {CHUNK}"):
        compare_head.check_against_oracle(spec, "triton")


def test_every_entry_has_a_reason_and_every_chip_every_role() -> None:
    for chip in tuning.CHIPS:
        for role in ("many", "options", "few"):
            for kernel in tuning.KERNELS:
                assert tile_of(chip, kernel, role).why
                assert tile_of(chip, kernel, "unaligned", role).why
        assert tuning.chunk_for(torch.device("cpu")).why


@pytest.mark.parametrize("plan", ["triton", "gluon"])
def test_fp32_on_a_gpu_is_the_vendors(plan: str) -> None:
    with override(f"chip=sm_90 plan={plan}"):
        for kernel in tuning.KERNELS:
            asked = functools.partial(tuning.plan_for, torch.device("cpu"), kernel)
            assert asked(torch.float32, 4096) == "vendor" and asked(torch.bfloat16, 4096) == plan


def test_assignments_change_one_kernel_or_both() -> None:
    before = tile_of("sm_90", "forward", "many")
    with override("many.group=4"), override("dlogits.many.num_stages=3 many.group=2"):
        assert tile_of("sm_90", "forward", "many").group == 2
        assert tile_of("sm_90", "forward", "many").num_stages == before.num_stages
        assert tile_of("sm_90", "dlogits", "many").num_stages == 3
        assert tile_of("sm_90", "dlogits", "few") == tile_of("sm_90", "forward", "few")
    assert tile_of("sm_90", "forward", "many") == before


def test_the_environment_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file's entries replace; assignments beside it, and overrides, come after."""
    tile = {"block_r": 64, "block_v": 64, "block_d": 32, "group": 3, "num_warps": 4}
    measured = tmp_path / "measured.json"
    measured.write_text(
        json.dumps(
            {
                "tiles": {"sm_90": {"many": tile | {"num_stages": 2, "dlogits": {"group": 5}}}},
                "plans": {"sm_90": {"forward": [{"rows": 512, "plan": "vendor", "why": "x"}]}},
            }
        )
    )
    monkeypatch.setenv("ROMA_TUNING", str(measured))
    assert tile_of("sm_90", "forward", "many").group == 3
    assert tile_of("sm_90", "dlogits", "many").group == 5
    assert tile_of("sm_90", "forward", "few").group == 1  # not in the file
    assert [plan_of("sm_90", "forward", rows) for rows in (511, 512)] == ["triton", "vendor"]
    assert plan_of("sm_90", "dlogits", 512) == "triton"
    with override("plan=gluon"):
        assert plan_of("sm_90", "forward", 512) == "gluon"
    monkeypatch.setenv("ROMA_TUNING", f"{measured} many.group=7")
    assert tile_of("sm_90", "forward", "many").group == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("many.grup=8", "ROMA_TUNING: expected plan=…"),
        ("most.group=8", "roles: many, options"),
        ("many.group=8.5", "got 'many.group=8.5'"),
        ("many.block_v=100", "a power of two"),
        ("chunk.columns=100", "a multiple of 64"),
        ("chunk.rows=0", "1 to"),
        ("many.group=0", "1 to"),
        ("gluon.block_v=512", "fields: "),
        ("gluon.num_stages=5", "2 to 4"),
        ("plan=cublas", "one of triton, vendor, gluon"),
        ("chip=sm_91", "one of sm_80"),
        ("nowhere.json", "a JSON file"),
    ],
)
def test_mistakes_are_named(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=said), override(text):
        pass
    monkeypatch.setenv("ROMA_TUNING", text)
    hidden, weight, tokens = torch.ones(1, 4), torch.ones(9, 4), torch.tensor([1])
    with pytest.raises(ValueError, match=said):
        roma.linear_logprob(hidden, weight, tokens, backend="triton")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"tiles": {"sm_90": {"many": {"group": 0}}}}, "sm_90 many.group=0"),
        ({"tiles": {"sm_90": {"many": {"dlogits": {"block_v": 100}}}}}, "a power of two"),
        ({"tiles": {"sm_90": {"gluon": {"block_v": 512}}}}, "gluon.block_v=512"),
        ({"chunks": {"sm_90": {"columns": 100}}}, "a multiple of 64"),
        ({"plans": {"sm_90": {"forward": [{"rows": 0, "plan": "cublas"}]}}}, "one of triton"),
        ({"tyles": {}}, "tiles, chunks, plans"),
    ],
)
def test_mistakes_in_a_file_are_named(entry: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=said), override(str(tmp_path / "wrong.json")):
        pass


@pytest.mark.parametrize("plan", ["triton", "vendor"])
@pytest.mark.parametrize("masked", [-torch.inf, -1e30, torch.finfo(torch.float32).min])
def test_a_bias_masks_whole_tiles_out(plan: str, masked: float) -> None:
    """−∞, or a large number as many write: nothing of the tile is left, and no NaN."""
    spec = HeadSpec(shape=(70,), d=32, v=1544, dtype=torch.float32, bias=True, entropy=True)
    inputs = spec.make()
    inputs["bias"][100:] = masked
    inputs["tokens"] %= 100
    short = inputs | {"weight": inputs["weight"][:100], "bias": inputs["bias"][:100]}
    want, eager = (compare_head.truth(short, dtype) for dtype in (torch.float64, torch.float32))
    noise = tolerance.logp_noise(want, inputs["hidden"], short["weight"], 1.0, torch.float32)
    with override(f"plan={plan} {CHUNK}"):
        hidden = inputs["hidden"].clone().requires_grad_()
        got = compare_head.score(inputs | {"hidden": hidden}, "triton", entropy=True)
        (dhidden,) = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), hidden)
    for name in ("logp", "entropy"):
        values = (getattr(x, name).detach() for x in (got, want, eager))
        tolerance.check(name, *values, dtype=torch.float32, noise=noise)
    assert bool(dhidden.isfinite().all())


def test_another_tile_gives_the_same_log_probs() -> None:
    """Tuning changes times, and sums by rounding alone: each of the two by its own."""
    spec = HeadSpec(shape=(80,), d=48, v=300, dtype=torch.float32)
    inputs = spec.make()
    want = compare_head.score(inputs, "triton").logp
    with override("many.block_v=128 many.block_r=32 many.block_d=16 many.group=1"):
        got = compare_head.score(inputs, "triton").logp
    exact = compare_head.truth(inputs)
    noise = tolerance.logp_noise(exact, inputs["hidden"], inputs["weight"], 1.0, torch.float32)
    assert bool(((got - want).abs() <= 2 * tolerance.SIGMAS * noise).all())


@pytest.mark.parametrize("worst_over", ["sequence", "token"])
def test_the_loss_by_the_vendors_plan(worst_over: str) -> None:
    spec = LossSpec(b=2, t=9, k=2, d=16, v=65, config=RomaConfig(worst_over=worst_over))
    with override(VENDOR):
        compare_whole.check_against_oracle(spec, "triton")
