"""The benchmark's promises: wrong is refused, slow is called slow, noise is nobody's win."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import against, data, estimate, gate, memory, ops, report, results
from bench import run as runner
from bench.__main__ import OPS
from bench.job import Options
from bench.measure import Times
from bench.providers import Unavailable
from bench.variants import Variant, on_states, plan

ROOT = Path(__file__).parents[2]
SMALL = Variant("linear_logprob", "both", tokens=16, views=2, depth=64, vocab=1000)


def smoke(*add: str, **others: Any) -> Options:
    modules = tuple(f"support.{name}" for name in add)
    return Options.of("smoke", "cpu", add=modules, with_memory=False, **others)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds the tests' modules too."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)


@pytest.mark.parametrize("op", ["linear_logprob", "roma_loss"])
def test_planted_providers(op: str, tmp_path: Path) -> None:
    """Slow is timed and called slower; wrong values and wrong gradients are refused by name."""
    out = tmp_path / "run.csv"
    variant = Variant(op, "both", tokens=16, views=2, depth=64, vocab=1000)
    runner.run([variant], smoke("planted_slow"), out)
    rows = {row["provider"]: row for row in results.read(out)}
    assert float(rows["slow"]["ratio_low"]) > 1 and "level" not in runner.verdict(rows["slow"])
    assert rows["shifted"]["reason"].startswith("refused: logp_max 5.0")
    assert rows["scaled"]["reason"].startswith("refused: dhidden")
    assert not rows["shifted"]["ms_p50"] and not rows["scaled"]["ms_p50"]
    if op == "roma_loss":  # the same function, so it is not tried twice
        assert rows["shifted active"]["reason"] == rows["shifted"]["reason"]
        assert float(rows["slow active"]["ratio_low"]) > 1
    assert float(rows["roma"]["logp_max"]) < 1e-5 and rows["roma"]["worst_view"] == "1.00e+00"


@pytest.mark.slow
def test_a_run_goes_on(tmp_path: Path) -> None:
    """What the CSV holds is kept as it is; what it lacks is measured."""
    out = tmp_path / "run.csv"
    how = smoke(providers=("naive", "eager"))
    runner.run([SMALL], how, out)
    before = results.read(out)
    more = [SMALL, Variant("view_loss", "both", tokens=16, views=2, depth=64, vocab=1000)]
    runner.run(more, how, out, resume=True)
    after = results.read(out)
    assert [row["ms_p50"] for row in after[: len(before)]] == [row["ms_p50"] for row in before]
    assert {row["op"] for row in after[len(before) :]} == {"view_loss"}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """The smoke plan as a user runs it, and the plots and the table from its CSV."""
    out = tmp_path / "smoke.csv"
    command = [sys.executable, "-m", "bench", "--preset", "smoke", "--out", str(out)]
    command += ["--providers", "naive fp32,naive fp32 active,eager,two-pass,pillow"]
    command += ["--no-memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "roma_loss, forward + backward, 50% right" in done.stdout
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == set(OPS)
    assert {row["provider"] for row in rows if row["op"] == "update_step"} == {"roma", "two-pass"}
    assert {"commit", "machine", "torch", "version", "ms_p20", "extra_mib", "entropy_p50"} <= set(
        rows[0]
    )
    ours = next(r for r in rows if r["op"] == "roma_loss" and r["provider"] == "roma")
    assert float(ours["executed_gflop"]) >= float(ours["useful_gflop"]) > 0
    assert [path.exists() for path in report.plots(rows, out)] == [True]
    table = report.table(rows, out)
    assert "| **roma** |" in table and "| naive fp32 |" in table
    assert f"](../bench/results/{out.name})" in table  # as seen from docs/BENCHMARKS.md


@pytest.mark.parametrize(
    ("run", "documents"),
    [("cpu-full", ["docs/BENCHMARKS.md", "docs/COST.md"]), ("cpu-views", ["docs/VIEWS.md"])],
)
def test_the_documents_hold_the_committed_runs_tables(run: str, documents: list[str]) -> None:
    """And README none: what `--report` would write is what stands there."""
    path = results.FOLDER / f"{run}.csv"
    rows = results.read(path)
    made = [report.views] if run == "cpu-views" else [report.table, report.costs]
    for name, make in zip(documents, made, strict=True):
        text = (ROOT / name).read_text()
        assert report.between_markers(text, make(rows, path), name) == text
    assert ":begin, written by" not in (ROOT / "README.md").read_text()


def test_a_document_without_its_markers_is_an_error() -> None:
    """A table that is written nowhere would leave the old figures in place, unnoticed."""
    with pytest.raises(
        ValueError, match=r"docs/X\.md: expected one <!-- bench:begin.*, got 0; put"
    ):
        report.between_markers("no markers\n", "a table", "docs/X.md")


def test_ligers_own_loss_is_ours_of_one_image(tmp_path: Path) -> None:
    """The same number and the same gradients, or it would be refused."""
    pytest.importorskip("liger_kernel", reason="make bench installs it")
    variant = Variant("roma_loss", "both", tokens=32, views=0, depth=64, vocab=1000)
    run = ("roma", "naive fp32", "liger grpo")
    runner.run([variant], smoke(providers=run), tmp_path / "x.csv")
    times = {row["provider"]: row["ms_p50"] for row in results.read(tmp_path / "x.csv")}
    assert set(times) == set(run) and all(times.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", "nonsense"], "invalid choice: 'nonsense'"),
        (["--states", "gone.pt"], "--states: [Errno 2] No such file"),
        (["--states", "README.md"], "--states: "),
        (["--states", "{wrong}"], "got hidden [3, 8], weight [50, 9]"),
    ],
)
def test_wrong_input(options: list[str], said: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pt"
    torch.save({"hidden": torch.ones(3, 8), "weight": torch.ones(50, 9)}, wrong)
    command = [sys.executable, "-m", "bench", *(x.format(wrong=wrong) for x in options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr


def test_states_of_ones_own(tmp_path: Path) -> None:
    """The file's sizes are the variant's, in the columns, the FLOP and the memory's process."""
    file = str(tmp_path / "states.pt")
    made = data.make(data.Shape(40, 0, 64, 1000), "cpu", seed=5)
    torch.save({"hidden": made.states[0], "weight": made.weight}, file)
    variants = on_states(plan("quick", "cpu"), file, *data.load(file)[0].shape, 1000)
    assert {v.op for v in variants} == {"linear_logprob", "roma_loss"}
    assert {(v.tokens, v.depth, v.vocab) for v in variants} == {(40, 64, 1000)}
    bench = ops.bench_of(variants[0], "cpu")
    assert bench.flop == 2.0 * 64 * 1000 * 40 * (variants[0].views + 1)
    case = bench.case  # type: ignore[attr-defined]
    assert torch.equal(case.states[0], made.states[0]) and torch.equal(case.weight, made.weight)
    assert memory.extra_mib(variants[0].line, "naive", "cpu") >= 0


ESTIMATED = (
    Variant("linear_logprob", "both", 64, 4, 256, 16_384),
    Variant("linear_logprob", "forward", 64, 4, 256, 16_384),
    Variant("linear_logprob", "both", 128, 1, 512, 8_192, dtype="fp32"),
    Variant("roma_loss", "both", 64, 4, 256, 16_384),
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ESTIMATED, ids=lambda v: f"{v.op}-{v.phase}-{v.dtype}")
def test_estimates_hold_against_measured_memory(variant: Variant) -> None:
    """Never below 0.8 of what a call really takes, and not far above.

    A peer's formula lists the tensors of its peak: 1.25, for one that may have died by then, and
    2 MiB for numbers a row. Ours allows for the two tiles of a workspace of 16 MiB (three in plain
    PyTorch), filled or not: 1.25, and those.
    """
    # Compiled forms take a minute, and one active form stands for all.
    left_out = {"compile", "cce compile"}
    names = [n for n in ops.names_of(variant) if n == "naive fp32 active" or " active" not in n]
    here = [name for name in names if name not in left_out and _loads(name)]
    bench = ops.bench_of(variant, "cpu", hold=False)
    active = bench.active_rows  # type: ignore[attr-defined]
    found = memory.extras_mib(variant.line, here, "cpu")
    assert {"roma", "roma torch", "naive fp32", "naive", "torch fused"} <= set(found)
    for name, measured in found.items():
        expected = estimate.timed(variant, name, "cpu", active) / 2**20
        slack = 3 * 16.0 if name.startswith("roma") else 2.0
        assert 0.8 * measured <= expected <= 1.25 * measured + slack, (name, measured, expected)


def _loads(name: str) -> bool:
    try:
        ops.provider_of(name).load("cpu")
    except Unavailable:
        return False
    return True


def test_memory_of_what_ends_badly() -> None:
    with pytest.raises(RuntimeError, match="said StopIteration"):
        memory.extra_mib(SMALL.line, "nobody", "cpu")
    with pytest.raises(RuntimeError, match=r"took more than 0\.1 s"):
        memory.extra_mib(SMALL.line, "roma", "cpu", limit=0.1)


def test_absent_packages_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is missing, ours too, has its reason on the screen and in the CSV."""
    views = Variant("views", "both", 2, 1, 32, 0, what="jpeg")
    runner.run([views], smoke("planted_absence"), tmp_path / "run.csv")
    rows = results.read(tmp_path / "run.csv")
    assert {row["provider"] for row in rows} == {"roma", "opencv", "pillow"}
    assert all(row["reason"].startswith("not here: ") for row in rows)
    assert "cv2" in capsys.readouterr().out


def test_views_are_reported_in_images_per_second() -> None:
    common = {"op": "views", "machine": "a CPU", "commit": "abc", "depth": "448", "tokens": "16"}
    beside = {"ratio": "2", "ratio_low": "1.5", "ratio_high": "3"}
    rows = [
        {**common, "what": "mix", "provider": "roma", "ms_p50": "20"},
        {**common, **beside, "what": "mix", "provider": "opencv", "ms_p50": "40"},
        {**common, **beside, "what": "jpeg", "provider": "roma", "ms_p50": "1000"},
        {**common, "what": "jpeg", "provider": "opencv", "reason": "not here"},
    ]
    lines = report.views(rows, Path("cpu-views.csv")).splitlines()
    assert lines[0] == "| images/s | 448×448: roma | opencv |"
    assert lines[2:4] == ["| mix | 800 | 400 (2×) |", "| jpeg | 16 | – |"]


def test_an_interval_with_one_in_it_is_level() -> None:
    ours = Times((10.0, 11.0, 10.0, 12.0, 10.0))
    same, twice = Times((11.0, 10.0, 10.0, 11.0, 12.0)), Times(tuple(2 * x for x in ours.ms))
    for times, expected in ((same, "level"), (twice, "2.00 [2.00, 2.00]")):
        ratio, low, high = times.over(ours)
        row = {"provider": "x", "ratio": f"{ratio}", "ratio_low": f"{low}", "ratio_high": f"{high}"}
        assert runner.verdict(row).endswith(expected)
    assert ours.quantile(0.5) == 10.0 and ours.quantile(0.8) == 11.2


def test_against_an_earlier_run(capsys: pytest.CaptureFixture[str]) -> None:
    def row(provider: str, units: float, spread: float = 0.05) -> results.Row:
        size = {"op": "roma_loss", "phase": "both", "tokens": "128", "views": "4", "depth": "512"}
        low, high = f"{units * (1 - spread)}", f"{units * (1 + spread)}"
        times = {"yardsticks": f"{units}", "yardsticks_low": low, "yardsticks_high": high}
        return {**size, "vocab": "9", "active": "1", "provider": provider, **times}

    earlier = [row("roma", 5), row("naive", 9), row("gone", 1)]
    assert against.compare(earlier, [row("roma", 5.2), row("naive", 9), row("new", 1)]) == 0
    assert "compared 2 timings" in capsys.readouterr().out
    assert against.compare(earlier, [row("roma", 4), row("naive", 12)]) == 0
    said = capsys.readouterr().out
    assert "faster: roma × 0.80 in roma_loss both" in said and "slower: naive × 1.33" in said
    assert against.compare(earlier, [row("roma", 6), row("naive", 9)]) == 1


def test_data_is_peaked_and_repeatable() -> None:
    """Half of the soft-maxes nearly certain, some flat; the same numbers from the same seed."""
    shape = data.Shape(tokens=128, views=2, depth=256, vocab=4096)
    first, second = data.make(shape, "cpu"), data.make(shape, "cpu")
    assert torch.equal(first.states, second.states) and torch.equal(first.tokens, second.tokens)
    said = data.describe(first)
    assert 0.05 < said["entropy_p50"] < 1.5 < said["entropy_p90"] and 15 < said["logit_max"] < 40
    # Sampled from the soft-max: the mean log-prob is minus the mean entropy.
    want = gate.truth(first)
    logp = want.logp[0]
    slack = 4 * float(logp.std()) / len(logp) ** 0.5
    assert abs(float(logp.mean()) + said["entropy_mean"]) < slack


def test_plans_hold_what_they_promise() -> None:
    """Every peer at the base size, the options around it, and a GPU's sizes."""
    quick = plan("quick", "cpu")
    assert {v.op for v in quick} == set(OPS)
    assert {v.active for v in quick} == {1.0, 0.5, 0.25, 0.1}
    loss = [v for v in quick if v.op == "roma_loss"]
    assert {v.views for v in loss} == {0, 1, 2, 4, 8} and {v.right for v in loss} == {0.0, 0.5, 1.0}
    assert {v.worst_over for v in loss} == {"sequence", "token"}
    paper = [v for v in plan("paper", "cuda") if v.op == "roma_loss"]
    assert {(v.tokens, v.views) for v in paper} >= {
        (n, k) for n in (1024, 4096, 16_384) for k in (2, 4, 8)
    }
    assert {(v.depth, v.vocab) for v in paper} == {(4096, 151_936)}
