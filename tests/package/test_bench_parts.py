"""What the benchmark is made of: our own candidates, its data without ours, a card's columns."""

from __future__ import annotations

import os
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import roma
from bench import estimate, loss_case, memory, nvidia, ops, own, report, results
from bench.data import Shape, make
from bench.measure import Clock, interleave, times_of
from bench.providers import OURS, Unavailable
from bench.variants import Variant, plan
from roma_kernels.linear_logprob.triton import tuning

GIB = 2**30


@pytest.mark.parametrize("name", own.PLANS)
def test_a_plan_without_its_back_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by name: the call would be answered by something else."""
    with pytest.raises(Unavailable, match="the Triton back end has plans"):
        own.OWN[name].load("cpu")
    monkeypatch.setattr(own, "choose", lambda device: ("triton", ""))
    own.OWN[name].load("cpu")
    monkeypatch.setattr(tuning, "PLANS", ("triton",))
    if name != "roma triton":
        with pytest.raises(Unavailable, match=r"plans are triton$"):
            own.OWN[name].load("cpu")
    monkeypatch.delattr(sys.modules[tuning.__package__], "tuning")
    monkeypatch.setitem(sys.modules, tuning.__name__, None)
    with pytest.raises(Unavailable, match="no plans in this checkout"):
        own.OWN[name].load("cpu")


def test_a_plan_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel would, under its name."""
    monkeypatch.setattr(own, "choose", lambda device: ("triton", ""))
    score = own.OWN["roma gluon"].load("cpu")
    with pytest.raises(Unavailable, match="plan gluon is for sm_90, this is interpreter"):
        score(torch.ones(2, 8), torch.ones(16, 8), torch.ones(2, dtype=torch.int64))


class Found(NamedTuple):
    logp: Tensor


@pytest.mark.parametrize("op", ["linear_logprob", "roma_loss"])
def test_a_candidate_of_ours_is_called_under_its_plan(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, when it is compared and when it is timed; the workspace too."""
    seen: list[tuple[str, int | None]] = []
    scored, whole = roma.linear_logprob, roma.roma_loss

    def note(workspace: int | None) -> None:
        seen.append((tuning.plan_of("sm_90", "forward", 4096), workspace))

    def logprob(states: Tensor, *arguments: Any, workspace: int | None, **named: Any) -> Any:
        note(workspace)
        if states.requires_grad:
            states.register_hook(lambda g: note(workspace))
        return scored(states, *arguments, **named)

    def loss(states: Tensor, *arguments: Any, workspace: int | None, **named: Any) -> Any:
        note(workspace)
        states.register_hook(lambda g: note(workspace))
        return whole(states, *arguments, **named)

    monkeypatch.setattr(own, "choose", lambda device: ("triton", ""))
    monkeypatch.setattr(roma, "linear_logprob", logprob)
    monkeypatch.setattr(roma, "roma_loss", loss)
    bench = ops.bench_of(Variant(op, "both", 16, 2, 64, 1000, among="card"), "cpu")
    plain = tuning.plan_of("sm_90", "forward", 4096)
    for name, expected in {
        "roma triton": ("triton", None),
        "roma vendor": ("vendor", None),
        "roma 4 GiB": (plain, 4 * GIB),
    }.items():
        seen.clear()
        check = bench.run(name)()
        assert check is not None
        check()
        assert len(seen) == 4 and set(seen) == {expected}


def test_a_card_gets_every_plan() -> None:
    """In that preset alone; and it holds on a CPU too, in small."""
    assert {v.among for v in plan("card", "cuda")} == {"card"}
    for variant in plan("card", "cpu"):
        names = ops.names_of(variant)
        assert names[: 1 + len(own.OTHERS)] == [OURS, *own.OTHERS]
    assert not set(own.OTHERS) & set(ops.names_of(plan("quick", "cuda")[0]))
    first, *rest = plan("card", "cuda")
    assert (first.op, first.tokens, first.views, first.vocab) == ("roma_loss", 4096, 4, 151_936)
    assert {v.tokens for v in rest if v.phase == "forward"} == {16_384, 4096, 1024, 64}
    assert {v.active for v in rest if v.op == "linear_logprob" and v.phase == "both"} == {1, 0.25}


@pytest.mark.parametrize("variant", plan("card", "cuda"), ids=str)
def test_what_decides_fits_a_card(variant: Variant) -> None:
    """On 78 GiB, of which a context takes one: the data, and with them each of ours."""
    rows = (variant.views + 1) * variant.tokens
    active = 0 if variant.phase == "forward" else rows
    data = estimate.data(variant)
    for name in (OURS, *own.OTHERS):
        assert data + estimate.needs(variant, name, "cuda", active) < 77 * GIB


def test_the_paper_preset_refuses_what_killed_it() -> None:
    """All logits of 81,920 rows: 46 GiB in fp32, three times."""
    variant = next(v for v in plan("paper", "cuda") if (v.tokens, v.views) == (16_384, 4))
    need = estimate.needs(variant, "naive fp32", "cuda", 1)
    assert 3 * 46 * GIB < need < 150 * GIB
    assert estimate.needs(variant, OURS, "cuda", 5 * 16_384) < 16 * GIB


def test_free_memory_of_a_cpu() -> None:
    """What /proc/meminfo says is available, and no more than the machine has."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0.01 * whole < memory.free("cpu") < whole


def test_data_without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of ours takes part until ours is a candidate."""

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("ours was called")

    for name in ("linear_logprob", "roma_loss", "roma_loss_from_logp"):
        monkeypatch.setattr(roma, name, never)
    for variant in (
        Variant("linear_logprob", "both", 16, 2, 64, 1000),
        Variant("roma_loss", "both", 32, 2, 64, 1000),
        Variant("roma_loss", "both", 32, 0, 64, 1000),
        Variant("view_loss", "both", 32, 2, 64, 1000),
    ):
        bench = ops.bench_of(variant, "cpu")
        bench.yardstick()
        bench.describe()
        if isinstance(bench, ops.HeadBench):
            assert bench.flop > 0
            bench.run("naive fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_of_the_loss_are_right(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles whose edges cut rows and vocabulary, against float64; no tile holds all columns."""
    monkeypatch.setattr(loss_case, "ROWS", 24)
    monkeypatch.setattr(loss_case, "COLUMNS", 300)
    case = make(Shape(tokens=40, views=2, depth=64, vocab=1000, dtype=dtype), "cpu")
    logits = case.rows.double() @ case.weight.double().T
    want = logits.log_softmax(1).gather(1, case.labels[:, None])[:, 0]
    got = loss_case.chunked_logp(case.rows, case.weight, case.labels)
    # A logit of |z| ≤ 40 is a sum of 64 products: √64·2⁻²⁴·40.
    assert got.dtype == torch.float32 and float((got - want).abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("views", "worst_over"), [*product((1, 3), ("sequence", "token")), (0, "sequence")]
)
def test_the_plain_loss_is_ours(views: int, worst_over: str) -> None:
    """Value and gradient, so that a peer's active rows are those of ours."""
    variant = Variant("roma_loss", "both", 64, views, 32, 200, worst_over=worst_over)
    logp, options = loss_case.loss_case(variant, make(variant.shape, "cpu"))
    leaf = logp.clone().requires_grad_()
    loss = roma.roma_loss_from_logp(leaf[0], leaf[1:], **options).loss
    (want,) = torch.autograd.grad(loss, leaf)
    got = loss_case.plain_loss(logp[0], logp[1:], **options)
    torch.testing.assert_close(got, loss.detach())
    torch.testing.assert_close(loss_case.plain_coefficients(logp, options), want)
    case, g = make(variant.shape, "cpu"), torch.randn(len(logp.flatten()))
    rows, weight = (x.float().requires_grad_() for x in (case.rows, case.weight))
    (roma.linear_logprob(rows, weight, case.labels, backend="torch").logp * g).sum().backward()
    found = loss_case.chunked_gradients(case.rows, case.weight, case.labels, g)
    for ours, plain in zip((rows, weight), found, strict=True):
        torch.testing.assert_close(ours.grad, plain, rtol=1e-4, atol=1e-4)


def test_states_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One call of nvidia-smi; absent, failing or of few words, it costs nothing but its columns."""
    monkeypatch.setenv("PATH", str(tmp_path))
    nothing = dict.fromkeys(nvidia.state(), "-")
    assert nvidia.state() == nothing and "sm_mhz" in nothing
    tool = tmp_path / "nvidia-smi"
    for script in ("exit 9", "echo 580.82", "echo 'No devices were found'"):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert nvidia.state() == nothing
    tool.write_text("#!/bin/sh\necho '580.82, 1980, 2619, 700.00, [N/A], 41'\n")
    found = nvidia.state()
    assert found == {
        "driver": "580.82", "sm_mhz": "1980", "memory_mhz": "2619", "power_limit_w": "700.00",
        "power_w": "-", "temperature_c": "41",
    }  # fmt: skip
    columns = nvidia.columns(nothing, found)
    assert (columns["temperature_before_c"], columns["temperature_after_c"]) == ("-", "41")


def test_rounds_go_on_where_they_ended() -> None:
    """A candidate that fails is out, the others' rounds are whole, earlier ones count."""
    calls: list[str] = []

    def attempt(name: str, what: str, action: Any) -> float | None:
        calls.append(f"{what}: {name}")
        return None if (name, what) == ("b", "round 3") else action()

    earlier = [{"a": 1.0, "b": 2.0, "c": 3.0}]
    runs = dict.fromkeys("abc", lambda: None)
    found = list(interleave(runs, Clock("cpu"), attempt, rounds=4, seconds=60.0, earlier=earlier))
    assert set(runs) == {"a", "c"} and [set(x) for x in found] == [set("abc"), set("ac"), set("ac")]
    assert len(calls) == 3 + 3 + 2 and calls[0].startswith("round 2")
    assert len(times_of("a", earlier + found, "cpu").ms) == 4
    few = interleave(dict(runs), Clock("cpu"), attempt, rounds=9, seconds=0.0, least=3)
    assert len(list(few)) == 3


def test_rows_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut while the CSV is written leaves the earlier one."""
    path = tmp_path / "x.csv"
    results.write(path, [{"a": "1"}])

    def torn(self: Any, rows: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.csv.DictWriter, "writerows", torn)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, [{"a": "2"}])
    assert results.read(path) == [{"a": "1"}]


def test_a_report_of_a_run_in_which_ours_failed(tmp_path: Path) -> None:
    """The peers' times without ratios, ours among what was not timed, no plot of ratios."""
    rows = results.read(results.FOLDER / "cpu-full.csv")
    why = "hangs: nothing after 60 s in its backward"
    empty = ("ms_", "yardsticks", "executed", "tflops")
    for row in rows:
        row |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "")
        if row["provider"] == OURS:
            row |= {key: "" for key in row if key.startswith(empty)} | {"reason": why}
    path = tmp_path / "run.csv"
    table = report.table(rows, path)
    assert "×)" not in table and "(level)" not in table and f"roma ({why})" in table
    assert re.search(r"\| naive fp32 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", table)
    assert report.costs(rows, path).startswith("Ours has no time of the loss")
    assert report.plot_of(path, "loss") not in report.plots(rows, path)
