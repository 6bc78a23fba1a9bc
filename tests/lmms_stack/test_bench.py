"""`roma bench-vlm` on seven tasks in the shape of the paper's, with a tiny model."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lmms_stack import killed_bench
from rich.console import Console

from roma.evaluate.folders import load_results
from roma.evaluate.lmms_eval.asked import Asked
from roma.evaluate.lmms_eval.benchmark import PAPER
from roma.evaluate.lmms_eval.run import run_bench
from roma.evaluate.record import read_rows

COLUMNS = ("drop", "relative", "corrective", "destructive")
LEVELS = ("L1", "L2", "L3")


def run(asked: Asked, out: Path) -> tuple[dict[str, Any], str]:
    """What it returns and says."""
    said = io.StringIO()
    return run_bench(asked, out, console=Console(file=said, width=80)), said.getvalue()


@pytest.fixture(scope="module")
def table(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three questions of each benchmark at all 28 conditions."""
    asked = replace(killed_bench.asked(suite), pools=["clean", "seen", "unseen"], levels=[1, 2, 3])
    out = tmp_path_factory.mktemp("bench") / "tiny"
    return out, run(replace(asked, limit=3, batch_size=16), out)[1]


def test_the_table_has_every_column(table: tuple[Path, str]) -> None:
    out, said = table
    found = json.loads((out / "bench.json").read_text())
    assert list(found["benchmarks"]) == list(PAPER)
    for name, part in [*found["benchmarks"].items(), ("average", found["average"])]:
        assert set(part["pools"]) == {"clean", "seen", "unseen"}
        for pool in ("seen", "unseen"):
            assert tuple(part["pools"][pool]) == tuple(part["robustness"][pool]) == LEVELS
            for level in LEVELS:
                assert tuple(part["robustness"][pool][level]) == COLUMNS
        assert len(part["detail"]) == 28, name
    page, text = (out / "bench.html").read_text(), (out / "bench.md").read_text()
    for name in PAPER:
        assert name in page and name in text
    for word in ("gaussian_noise", "pixelate", "orrective", "estructive", "elative"):
        assert word in text
    assert all(note in text for note in found["notes"]) and len(found["notes"]) == 8
    assert {path.suffix for path in out.glob("bench*")} == {".json", ".md", ".html", ".png"}
    notes = [line for line in said.splitlines() if line.startswith("note: ")]
    assert len(notes) == 8 and said.index(notes[0]) > said.index("average")
    assert "8 notes: " in said.partition("Accuracy")[0]
    assert "average" in said and f"wrote {out / 'bench.json'}" in said


def test_the_table_is_what_the_answers_say(table: tuple[Path, str]) -> None:
    """By hand: shares of right answers, their means over corruptions, then over benchmarks."""
    out, _ = table
    found = json.loads((out / "bench.json").read_text())
    macro = {"clean": [], "seen L3": []}
    for name in PAPER:
        rows = list(read_rows(out / name / "answers.jsonl"))
        assert len(rows) == 84 and [row.id for row in rows[:3]] == [f"{name}/{i}" for i in range(3)]
        cells: dict[Any, list[float]] = {}
        for row in rows:
            cells.setdefault(row.cell, []).append(row.correct[0])
        clean = next(value for cell, value in cells.items() if cell.level == 0)
        seen = [v for cell, v in cells.items() if (cell.pool, cell.level) == ("seen", 3)]
        macro["clean"].append(100 * np.mean(clean))
        macro["seen L3"].append(100 * np.mean(seen))
        pools = found["benchmarks"][name]["pools"]
        assert pools["clean"]["mean"] == pytest.approx(macro["clean"][-1], abs=1e-3)
        assert pools["seen"]["L3"]["mean"] == pytest.approx(macro["seen L3"][-1], abs=1e-3)
        lost = 100 * np.mean([np.maximum(np.subtract(clean, v), 0) for v in seen])
        flips = found["benchmarks"][name]["robustness"]["seen"]["L3"]["destructive"]
        assert flips["mean"] == pytest.approx(lost, abs=1e-3)
    average = found["average"]["pools"]
    assert average["clean"]["mean"] == pytest.approx(np.mean(macro["clean"]), abs=1e-3)
    assert average["seen"]["L3"]["mean"] == pytest.approx(np.mean(macro["seen L3"]), abs=1e-3)
    assert average["seen"]["L3"]["mean"] < average["clean"]["mean"]  # it saw the noise


def test_clean_accuracy_is_lmms_evals_own(table: tuple[Path, str], suite: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(suite / "tasks"), include_defaults=False)
    theirs = simple_evaluate(
        model="qwen3_vl",
        model_args=f"pretrained={suite / 'model'},device=cpu,device_map=cpu",
        tasks=list(PAPER),
        task_manager=tasks,
        batch_size=16,
        limit=3,
        gen_kwargs="max_new_tokens=8",
    )
    out, _ = table
    ours = json.loads((out / "bench.json").read_text())["benchmarks"]
    for name, metric in PAPER.items():
        clean = ours[name]["pools"]["clean"]["mean"]
        assert clean == pytest.approx(100 * theirs["results"][name][f"{metric},none"], abs=1e-3)
        texts = [sample["filtered_resps"][0] for sample in theirs["samples"][name]]
        rows = [row for row in read_rows(out / name / "texts.jsonl") if row.cell.level == 0]
        assert [row.texts[0] for row in rows] == texts


def test_a_finished_run_prints_its_table_again(
    table: tuple[Path, str], suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roma.evaluate.lmms_eval import model

    monkeypatch.setattr(model, "RomaModel", None)  # nothing is loaded
    out, first = table
    before = (out / "bench.json").read_bytes()
    asked = replace(killed_bench.asked(suite), pools=["clean", "seen", "unseen"], levels=[1, 2, 3])
    _, said = run(replace(asked, limit=3, batch_size=16), out)
    assert "588 of 588 answers were there already" in said
    assert first.partition("Accuracy")[2] in said
    assert (out / "bench.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"^out: expected a new folder, .* max_tokens = 8 there"):
        run(replace(asked, limit=3, batch_size=16, max_tokens=9), out)
    results = load_results(out)
    assert list(results.benchmarks) == list(PAPER)


def test_killed_ten_times_it_writes_the_same(suite: Path, tmp_path: Path) -> None:
    """At random moments, and in the midst of a batch that then is on disk in part."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    left = {}
    for name, kills in (("cut", 10), ("whole", 0)):
        out = tmp_path / name / "run"
        command = [sys.executable, "-m", "lmms_stack.killed_bench", suite, out, str(kills)]
        ran = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        left[name] = [int(line) for line in ran.stdout.split()]
    every = 2 * 7 * 6 * 5  # texts and scores
    assert left["whole"] == [every] and left["cut"][-1] == every and len(left["cut"]) == 11
    assert left["cut"] == sorted(left["cut"]) and 0 < left["cut"][5] < left["cut"][9] < every
    files = [path.relative_to(out) for path in out.rglob("[!.]*") if path.suffix != ".log"]
    files = [name for name in files if (out / name).is_file()]
    assert len(files) == 1 + 3 + 2 + 7 * 3  # settings; json, md, html; figures; of each benchmark
    for name in files:
        cut, whole = (tmp_path / each / "run" / name for each in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), name
