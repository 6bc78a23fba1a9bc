"""What `make gpu` makes of its findings: the page, the bars, a tuning table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import bars, runner, table, winners
from bench.gpu.journal import Journal


def page(out: Path) -> str:
    return (out / table.PAGE).read_text()


def recorded(path: Path) -> Journal:
    """A run on a card, as it might have gone."""
    journal = Journal(path)
    journal.append("call", time="2026-12-01 10:00:00", commit="abc1234", device="cuda")
    one = {"step": "facts", "part": "card", "status": "ok"}
    journal.append("row", item="machine", name="NVIDIA H100", driver="580.1", commit="abc1234",
                   multiprocessors=132, l2_mib=50.0, **one)  # fmt: skip
    journal.append("row", item="product", tflops=800.0, size=8192.0, tflops_best=810.0, **one)
    for name in ("test_a", "test_b"):
        journal.append("row", step="tests", part="pytest", item=name, status="ok", reason="")
    journal.append("end", step="tests", part="pytest", status="ok", reason="", seconds=200.0)
    for plan, status in (("triton", "ok"), ("gluon", "crashed"), ("vendor", "ok")):
        journal.append("row", step="correct", part=plan, item=f"{plan}, ragged, head",
                       status=status, reason="died of SIGABRT" if status != "ok" else "",
                       logp_rms=1e-5, logp_rms_bound=1e-4)  # fmt: skip
    journal.append("row", step="correct", part="gluon", item="gluon, fp16, head", status="ok")
    for stages, ratio, high in ((4, 1.0, 1.02), (3, 0.9, 0.92), (5, 0.97, 0.99), (2, 0.8, 1.01)):
        entries = {"block_r": 128, "block_v": 256, "block_d": 64, "group": 16, "num_warps": 8,
                   "num_stages": stages, "descriptors": True, "persistent": True}  # fmt: skip
        journal.append("row", step="sweep", part="time", item=f"time: stages {stages}", status="ok",
                       chip="sm_90", kernel="dlogits", role="many", entries=entries, ms=10 * ratio,
                       ratio=ratio, ratio_low=ratio - 0.02, ratio_high=high,
                       size="R=8192")  # fmt: skip
    for plan, ratio in (("vendor", 0.95), ("gluon", 0.8)):
        for rows in (1024, 4096):
            slower = 0.3 if rows == 1024 else 0.0
            journal.append("row", step="sweep", part="plans", item=f"plan {plan} {rows}", rows=rows,
                           status="ok", chip="sm_90", plan_of="forward", plan=plan, ms=1.0,
                           ratio=ratio + slower, ratio_low=ratio + slower - 0.01,
                           ratio_high=ratio + slower + 0.01, size=f"R={rows}")  # fmt: skip
    journal.append("row", step="profile", part="kernels", item="time: _fwd", calls=2, ms=3.0,
                   percent=60.0, status="ok")  # fmt: skip
    journal.append("row", step="profile", part="ncu", item="triton: _fwd #1", status="ok",
                   registers=255.0, **{"L2 hit %": 71.5})  # fmt: skip
    return journal


COLUMNS = ("op", "phase", "tokens", "views", "depth", "vocab", "dtype", "active", "worst_over",
           "provider", "ms_p50", "ms_p20", "ms_p80", "ratio", "ratio_low", "ratio_high", "tflops",
           "product_tflops", "extra_mib", "logp_rms", "reason")  # fmt: skip


def bench_row(op: str, phase: str, tokens: int, views: int, provider: str, **values: Any) -> dict:
    base = {"op": op, "phase": phase, "tokens": tokens, "views": views, "depth": 4096,
            "vocab": 151936, "dtype": "bf16", "active": 1, "worst_over": "sequence",
            "provider": provider}  # fmt: skip
    if "ratio" in values:
        ratio = values["ratio"]
        values = {"ratio_low": ratio - 0.05, "ratio_high": ratio + 0.05, "ms_p50": 10 * ratio,
                  "ms_p20": 9 * ratio, "ms_p80": 11 * ratio} | values  # fmt: skip
    return {name: str(value) for name, value in (base | values).items()}


BENCHED = [
    bench_row("roma_loss", "both", 4096, 4, "roma", ratio=1.0, tflops=500),
    bench_row("roma_loss", "both", 4096, 4, "roma torch", ratio=1.2, tflops=400),
    bench_row("roma_loss", "both", 4096, 4, "liger", ratio=3.0, tflops=170),
    bench_row("roma_loss", "both", 4096, 4, "verl active", ratio=1.9, tflops=260),
    bench_row("roma_loss", "both", 4096, 4, "naive fp32", reason="out of memory: 50 GiB"),
    bench_row("roma_loss", "both", 4096, 4, "quack", reason="not here: pip install quack-kernels"),
    bench_row("linear_logprob", "forward", 16384, 0, "roma", ratio=1.0, tflops=690,
              product_tflops=780),
    bench_row("linear_logprob", "forward", 16384, 0, "verl", ratio=1.5, tflops=460),
]  # fmt: skip


def write_bench(out: Path, rows: list[dict[str, str]]) -> None:
    out.mkdir(exist_ok=True)
    with (out / table.BENCH).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def test_the_page_of_a_whole_run(tmp_path: Path) -> None:
    journal = recorded(tmp_path / runner.JOURNAL)
    write_bench(tmp_path, BENCHED)
    table.write(tmp_path, journal)
    text = page(tmp_path)
    for line in (
        "NVIDIA H100, 132 multiprocessors, 50 MiB of L2, driver 580.1.",
        "Measured: the vendor's bf16 product 800 TFLOP/s (8192³, best 810).",
        "Calls: 2026-12-01 10:00:00, commit abc1234, cuda.",
        "| pytest -m gpu | 2 passed, 0 not, 0 skipped | met |",
        "| loss, N=4096 K=4 D=4096 V=151936: ≥ 1.8 × | 1.90 × [1.85, 1.95]: verl active, of 2",
        "≥ 85 %, then 90 % of the product | 86.2 % of 800 TFLOP/s | 85 % met |",
        "| faster than verl's Triton kernel at every size | 2 timings; the lowest ≥ 1.45 ×",
        "| correct: gluon, ragged, head | 1.0e-05 | 0.1 | crashed | died of SIGABRT |",
        "| naive fp32 |  |  |  |  |  | out of memory: 50 GiB |",
        "Not here: quack.",
        "tiles.sm_90.many, dlogits: num_stages 4 → 3: 0.900 [0.880, 0.920] of the time before",
        "plans.sm_90.forward: vendor from 4096 rows",
        "| _fwd | 2 | 3 | 60 |",
        "| L2 hit % | 71.5 |",
    ):
        assert line in text, (line, text)
    with (tmp_path / table.NUMBERS).open() as file:
        numbers = {
            (r["section"], r["subject"], r["quantity"]): r["value"] for r in csv.DictReader(file)
        }
    assert numbers["facts", "product", "tflops"] == "800.0"
    assert numbers["bar", "pytest -m gpu", "verdict"] == "met"
    assert any(k[0] == "benchmark" and v == "1.9" for k, v in numbers.items())


@pytest.mark.parametrize(
    ("change", "bar", "verdict"),
    [
        ({("liger", "ratio_low"): "1.7", ("liger", "ratio"): "1.75"}, "loss", "missed"),
        ({("verl active", "ratio_low"): "1.79"}, "loss", "missed"),
        ({("verl", "ratio_low"): "0.99"}, "faster than verl", "missed"),
        ({("roma", "tflops"): "679"}, "forward", "missed"),
        ({("roma", "tflops"): "721"}, "forward", "met"),
        ({("roma", "product_tflops"): "900"}, "forward", "missed"),
        ({("roma", "ms_p50"): "", ("roma", "reason"): "refused: dhidden"}, "loss", "not measured"),
        ({("roma", "ms_p50"): ""}, "forward", "not measured"),
        ({("roma", "ms_p50"): ""}, "faster than verl", "not measured"),
        ({("liger", "ms_p50"): "", ("verl active", "ms_p50"): ""}, "loss", "not measured"),
        ({("roma", "tflops"): "rubbish"}, "forward", "not measured"),
    ],
)
def test_the_bars(change: dict[tuple[str, str], str], bar: str, verdict: str) -> None:
    rows = [dict(row) for row in BENCHED]
    for (provider, name), value in change.items():
        for row in rows:
            if row["provider"] == provider:
                row[name] = value
    found = {b.what: b.verdict for b in bars.bars({}, rows, 800.0, True)}
    assert next(v for what, v in found.items() if what.startswith(bar)) == verdict


@pytest.mark.parametrize(
    ("statuses", "whole", "verdict"),
    [
        (("ok", "ok"), True, "met"),
        (("ok", "skipped"), True, "met"),
        (("ok", "ok"), False, "not measured"),
        (("ok", "crashed"), False, "missed"),
        (("ok", "timeout"), True, "missed"),
        (("skipped",), True, "not measured"),
        ((), False, "not measured"),
    ],
)
def test_the_bar_of_the_tests(statuses: tuple[str, ...], whole: bool, verdict: str) -> None:
    tests = {str(i): {"status": status} for i, status in enumerate(statuses)}
    assert bars.bars(tests, [], None, whole)[0].verdict == verdict


def test_a_page_of_nothing_and_of_rubbish(tmp_path: Path) -> None:
    """Every bar is there, not measured; what makes no sense is shown or left out."""
    table.write(tmp_path, Journal(tmp_path / "gpu.jsonl"))
    assert page(tmp_path).count("not measured") == 4
    assert not (tmp_path / table.TUNING).exists()
    journal = Journal(tmp_path / "gpu.jsonl")
    for step in ("facts", "correct", "tests", "sweep", "roles", "profile", "sanitizer", "new"):
        journal.append("row", step=step, item="x", status=7, ms="?", ratio=None, entries=3, chip=4)
        journal.append("row", step=step, item="product", tflops=[], role="many", chip="sm_1",
                       kernel="k", entries={}, status="ok", ms=1, ratio=1, ratio_low=1,
                       ratio_high=0.5)  # fmt: skip
        journal.append("row", step=step)
        journal.append("end")
    (tmp_path / table.BENCH).write_bytes(b'provider,ms_p50\n\xff\x00roma,"a\nb"\n\n,,,,\nx\n')
    table.write(tmp_path, journal)
    assert page(tmp_path).count("not measured") == 4


def test_a_cpu_says_nothing_about_a_bar(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    journal.append("call", device="cpu")
    journal.append("row", step="tests", item="x", status="ok")
    journal.append("end", step="tests", part="pytest", status="ok")
    write_bench(tmp_path, BENCHED)
    table.write(tmp_path, journal)
    assert page(tmp_path).count("not measured") == 4


def test_what_won_is_a_tuning_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package reads it; a plan that crashed against float64 is not in it, however fast."""
    from roma_kernels.linear_logprob.triton import tuning

    before = tuning.tile_of("sm_90", "forward", "many")
    table.write(tmp_path, recorded(tmp_path / "gpu.jsonl"))
    monkeypatch.setenv("ROMA_TUNING", str(tmp_path / table.TUNING))
    tile = tuning.tile_of("sm_90", "dlogits", "many")
    assert tile.num_stages == 3 and "0.900" in tile.why and "NVIDIA H100" in tile.why
    assert tuning.tile_of("sm_90", "forward", "many") == before
    assert [tuning.plan_of("sm_90", "forward", n) for n in (64, 1024, 4096, 10**6)] == [
        "triton", "triton", "vendor", "vendor"
    ]  # fmt: skip


def test_a_broken_entry_loses_to_any_that_works(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    entries = json.loads(winners.PRESENT.read_text())["tiles"]["sm_90"]["few"] | {"num_stages": 2}
    entries.pop("why")
    row = {"step": "sweep", "status": "ok", "chip": "sm_90", "kernel": "forward", "role": "few",
           "broken": "spills 8 registers"}  # fmt: skip
    for stages, ratio in ((2, 1.0), (3, 2.0)):
        ratios = {name: ratio for name in ("ms", "ratio", "ratio_low", "ratio_high")}
        changed = entries | {"num_stages": stages}
        journal.append("row", item=f"time: {stages}", entries=changed, **ratios, **row)
    text, changes = winners.table(journal)
    assert json.loads(text)["tiles"]["sm_90"]["few"]["num_stages"] == 2
    assert "spills 8 registers" in changes[0]
