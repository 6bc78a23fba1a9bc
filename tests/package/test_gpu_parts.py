"""What the parts of `make gpu` find: a wrong kernel is refused, and counters are read."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import roma
from bench.gpu import correct, profile, sweep, tests, work
from bench.gpu.points import Point, combined, points
from bench.processes import Outcome
from roma_kernels.linear_logprob import triton_backend
from roma_kernels.linear_logprob.triton import tuning

SMALL = [
    correct.Case("fp32", 2, 9, 2, 48, 257, torch.float32),
    correct.Case("bf16", 3, 12, 1, 64, 300),
    correct.Case("fp16", 2, 8, 1, 64, 300, torch.float16),
    correct.Case("one image", 2, 8, 0, 64, 300),
]
OPTIONS = [dataclasses.replace(case, options=True) for case in SMALL[:3]]


def wrong_names(errors: correct.Errors) -> set[str]:
    return {name for name, (value, bound) in errors.items() if not value <= bound}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_right_loss_is_right(case: correct.Case) -> None:
    errors = correct.loss(case, "torch", "cpu")
    assert not wrong_names(errors) and {"loss", "dhidden", "dweight"} <= set(errors)
    assert ("gap_rms" in errors) == bool(case.views)


@pytest.mark.parametrize("case", [*SMALL, *OPTIONS], ids=lambda case: f"{case.name} {case.options}")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_right_head_is_right(case: correct.Case, backend: str) -> None:
    errors = correct.head(case, backend, "cpu")
    assert not wrong_names(errors) and ("entropy_max" in errors) == case.options


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.share * g, None


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("one log-prob", {"logp_max", "logp_rms", "gap_rms"}),
        ("a lane that counts", {"logp_max", "logp_rms"}),
        ("dhidden", {"dhidden"}),
        ("dweight", {"dweight"}),
        ("nothing written", {"logp_max", "logp_rms", "gap_rms", "dhidden", "dweight"}),
    ],
)
def test_a_wrong_head_is_named(
    planted: str, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten times the bounds, by the quantity that is off."""
    real = roma.linear_logprob

    def head(hidden: Tensor, weight: Tensor, tokens: Tensor, **how: Any) -> Any:
        if planted == "dhidden":
            hidden = _Scaled.apply(hidden, 1.1)
        if planted == "dweight":
            weight = _Scaled.apply(weight, 1.1)
        got = real(hidden, weight, tokens, **how)
        if planted == "one log-prob":
            off = torch.zeros_like(got.logp)
            off[5] = 1e-2
            got = got._replace(logp=got.logp + off)
        if planted == "a lane that counts":
            got = got._replace(logp=got.logp - 1e-3)
        if planted == "nothing written":
            got = got._replace(logp=got.logp * torch.nan)
        return got

    monkeypatch.setattr(roma, "linear_logprob", head)
    assert wrong_names(correct.head(SMALL[1], "torch", "cpu")) == found


def test_the_program_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN exceeds every bound."""
    monkeypatch.setitem(correct.CASES, "interpreted", SMALL[:1])
    real = roma.linear_logprob

    def head(*args: Any, **how: Any) -> Any:
        got = real(*args, **how)
        return got._replace(logp=got.logp * torch.nan)

    monkeypatch.setattr(roma, "linear_logprob", head)
    correct.main("interpreted", "torch", "cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("@row ")) for line in lines if line.startswith("@row ")]
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"].startswith("logp_max nan exceeds")


def test_a_wrong_loss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term that is a tenth too large."""
    real = roma.roma_loss

    def loss(*args: Any, **how: Any) -> Any:
        config = dataclasses.replace(how["config"], lambda_aux=1.1 * how["config"].lambda_aux)
        return real(*args, **how | {"config": config})

    monkeypatch.setattr(roma, "roma_loss", loss)
    assert "loss" in wrong_names(correct.loss(SMALL[1], "torch", "cpu"))
    assert "dhidden" in wrong_names(correct.loss(SMALL[1], "torch", "cpu"))


# The sweep


@pytest.mark.parametrize("kernel", ["forward", "dlogits"])
@pytest.mark.parametrize("role", ["few", "options"])
def test_a_right_kernel_is_held(kernel: str, role: str) -> None:
    made = work.Work(kernel, role, "cpu", work.size_of(role, "cpu"))
    for plan in ("triton", "vendor"):
        with tuning.override(f"plan={plan}"):
            assert made.held() == ""


@pytest.mark.parametrize(
    ("kernel", "role", "place", "value", "said"),
    [
        ("forward", "few", (0, 3), 9.0, "largest error of logp"),
        ("forward", "options", (3, 3), 9.0, "largest error of entropy"),
        ("dlogits", "few", (3, 17), 1.0, "largest error of dz"),
        ("dlogits", "few", (3, 17), torch.nan, "largest error of dz nan"),
    ],
)
def test_a_wrong_kernel_is_refused(
    kernel: str, role: str, place: Any, value: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one element."""
    made = work.Work(kernel, role, "cpu", work.size_of(role, "cpu"))
    real = triton_backend.KERNELS

    def sweep(rows: Any, head: Any, sums: Tensor) -> None:
        real.sweep(rows, head, sums)
        sums[place] = value

    def dlogits(active: Any, head: Any) -> Tensor:
        dz = real.dlogits(active, head)
        dz[place] = value
        return dz

    planted = real._replace(**{kernel.replace("forward", "sweep"): locals()[
        kernel.replace("forward", "sweep")]})  # fmt: skip
    monkeypatch.setattr(triton_backend, "KERNELS", planted)
    assert made.held().startswith(said)


def test_what_a_kernel_leaves_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the memory that it gets has the right result of the call before."""
    made = work.Work("dlogits", "few", "cpu", work.size_of("few", "cpu"))
    real = triton_backend.KERNELS
    right = made.run()

    def lazy(active: Any, head: Any) -> Tensor:
        dz = torch.empty_like(right)
        if torch.isnan(dz).all():
            dz[:, :-1] = right[:, :-1]
            return dz
        return right

    monkeypatch.setattr(triton_backend, "KERNELS", real._replace(dlogits=lazy))
    assert made.held().startswith("largest error of dz nan")


def entry_of(chip: str, role: str) -> dict[str, Any]:
    entry = dataclasses.asdict(tuning.tile_of(chip, "forward", role))
    return {name: value for name, value in entry.items() if name != "why"}


SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("role", ["many", "options", "few"])
def test_points_are_what_the_tuning_table_takes(chip: str, role: str) -> None:
    """The present entry first; each is another, and the package reads it as it was meant."""
    present = entry_of(chip, role)
    made = points("forward", role, present, SHARED[chip] * 1024)
    assert made[0].entry == present and made[0].what == "present"
    assert len({point.name for point in made}) == len(made) > 8
    for point in made:
        with tuning.override(f"chip={chip} {point.text}"):
            found = dataclasses.asdict(tuning.tile_of(chip, "forward", role))
            assert {k: found[k] for k in point.entry} == point.entry
            assert tuning.tile_of(chip, "dlogits", role) == tuning.tile_of(chip, "dlogits", role)
    groups = {p.entry["group"] for p in made}
    assert {1, 8, 32} <= groups and {p.what for p in made} >= {"group", "blocks", "depth"}


def test_the_points_of_the_warp_specialised_kernels() -> None:
    """Their ring and their group; the plan is theirs."""
    made = points("dlogits", "gluon", entry_of("sm_90", "gluon"), 227 * 1024)
    assert {point.entry["num_stages"] for point in made} == {2, 3, 4}
    assert len({point.entry["group"] for point in made}) > 4
    assert {(p.entry["block_r"], p.entry["block_v"]) for p in made} == {(128, 256)}
    for point in made:
        with tuning.override(f"chip=sm_90 {point.text}"):
            assert tuning.plan_of("sm_90", "dlogits", 4096) == "gluon"
            assert tuning.tile_of("sm_90", "dlogits", "gluon").group == point.entry["group"]


def test_the_chunks_points() -> None:
    made = points("forward", "chunk", {"rows": 2048, "columns": 4096}, 0)
    assert made[0].name == "chunk 2048 × 4096" and len(made) > 8
    for point in made:
        with tuning.override(point.text):
            chunk = tuning.chunk_for(torch.device("cpu"))
            assert (chunk.rows, chunk.columns) == (point.entry["rows"], point.entry["columns"])
            assert tuning.plan_of("sm_90", "forward", 10) == "vendor"


def test_the_best_changes_together() -> None:
    """One of a kind, the fastest; the best product first; nothing that cannot be held."""
    present = points("forward", "many", entry_of("sm_90", "many"), 227 * 1024)[0]

    def change(what: str, **entry: int) -> Point:
        return Point("forward", "many", present.entry | entry, what)

    winners = [
        (change("group", group=32), 0.97),
        (change("group", group=8), 0.95),
        (change("stages", num_stages=3), 0.9),
        (change("depth", block_d=128, num_stages=2), 0.99),
    ]
    made = combined(present, winners, 227 * 1024)
    assert [point.what for point in made][:2] == ["group + stages + depth", "group + stages"]
    assert made[1].entry == present.entry | {"group": 8, "num_stages": 3}
    assert combined(present, winners[:1], 227 * 1024) == []
    assert combined(present, winners, 10_000) == []


def test_a_point_that_ends_its_process_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that kills it, one that hangs; the others are held in new processes, none twice."""
    place = sweep.Place("forward", "few", "cpu")
    made = points("forward", "few", place.points[0].entry, 2**20)[:5]
    monkeypatch.setattr(place, "points", made)
    worker = (
        "import os, sys, time\n"
        "from bench.gpu.journal import start, tell\n"
        f"names = {[point.name for point in made]!r}\n"
        "for i in map(int, sys.argv[-1].split(',')):\n"
        "    start('hold: ' + names[i])\n"
        "    if i == 1: os.abort()\n"
        "    if i == 3: time.sleep(60)\n"
        "    tell('hold: ' + names[i])\n"
    )
    monkeypatch.setattr(sweep, "module", lambda *words: [sys.executable, "-c", worker, words[-1]])
    monkeypatch.setattr(sweep, "_SECONDS", 1.5)
    sweep.hold(place)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("@row ")) for line in lines if line.startswith("@row ")]
    assert {row["item"]: row["status"] for row in rows} == {
        f"hold: {point.name}": "crashed" if i in (1, 3) else "ok" for i, point in enumerate(made)
    }
    assert len(rows) == 5
    reasons = [row["reason"] for row in rows if row["status"] == "crashed"]
    assert any("SIGABRT" in why for why in reasons) and any(
        "said nothing" in why for why in reasons
    )


# Counters and tests


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","launch__registers_per_thread","gpu__time_duration.sum","lts__t_sector_hit_rate.pct","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","dram__bytes_read.sum","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_not_issued_per_issue_active.ratio"
"","","register/thread","msecond","%","%","Gbyte","inst","inst","inst"
"0","_linear_logprob_fwd_kernel","255","3.25","81.5","88.1","1.24","0.4","1.9","1.5"
"1","_dlogits_kernel","168","n/a","70","","2","0.1","0.2","0.3"
==PROF== Disconnected
"""  # noqa: E501


def test_counters_are_read() -> None:
    found = dict(profile.counted(NCU))
    first = found["_linear_logprob_fwd_kernel #1"]
    assert first["registers"] == 255 and first["time ms"] == 3.25 and first["L2 hit %"] == 81.5
    assert first["tensor pipe %"] == 88.1 and first["DRAM read MB"] == 1240
    assert [name for name in first if name.startswith("stalled")] == [
        "stalled on wait", "stalled on long_scoreboard"
    ]  # fmt: skip
    assert "time ms" not in found["_dlogits_kernel #1"]


def test_counters_have_the_units_of_their_names() -> None:
    """As Nsight Compute gave them on an H200: bytes a second, and bytes a block."""
    text = (
        '"ID","Kernel Name","dram__bytes.sum.per_second","launch__shared_mem_per_block"\n'
        '"","","byte/s","byte/block"\n"0","_dlogits_kernel","835875294931.89","197880"\n'
    )
    first = dict(profile.counted(text))["_dlogits_kernel #1"]
    assert first == {"DRAM GB/s": pytest.approx(835.875, abs=1e-3), "shared KB": 197.88}


def test_a_kernel_is_timed_once() -> None:
    """The profiler gives its time to the operator that launched it, too."""
    kinds = torch.autograd.DeviceType
    averages = [
        SimpleNamespace(key=key, count=2, device_type=kind, self_device_time_total=3000.0 * there,
                        self_cpu_time_total=500.0)
        for key, kind, there in (("aten::mm", kinds.CPU, 1), ("nvjet", kinds.CUDA, 1),
                                 ("aten::view", kinds.CPU, 0))
    ]  # fmt: skip
    assert profile.timed_once(averages, "cuda") == [("nvjet", 2, 3.0)]
    assert [key for key, *_ in profile.timed_once(averages, "cpu")] == ["aten::mm", "aten::view"]


@pytest.mark.parametrize("text", ["", "==ERROR== no metric\n", '"a","b"\n"1","2"\n', "rubbish\0"])
def test_no_counters(text: str) -> None:
    assert list(profile.counted(text)) == []


@pytest.mark.parametrize(
    ("code", "lines", "status", "reason"),
    [
        (0, ["1 passed in 3.21s"], "ok", ""),
        (0, ["SKIPPED [1] x.py:3: needs 80 GiB", "1 skipped in 0.1s"], "skipped", "needs 80 GiB"),
        (1, ["E   assert 3 == 4", "E   more", "1 failed in 2s"], "failed", "assert 3 == 4"),
        (0, ["nothing of the kind"], "crashed", ""),
        (-11, [], "crashed", "died of SIGSEGV"),
        (None, [], "timeout", "killed after 5 s"),
    ],
)
def test_how_a_test_ended(code: int | None, lines: list[str], status: str, reason: str) -> None:
    end = Outcome(code, "timeout" if code is None else "", 5.0, lines[-1] if lines else "")
    found = tests.verdict(end, lines)
    assert found[0] == status and reason in found[1]
