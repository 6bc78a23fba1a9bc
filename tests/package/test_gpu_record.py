"""The record of a card in bench/results, and what the table of tuning and the docs take from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import results
from bench.gpu import bars, summary, winners
from bench.gpu.journal import Journal
from roma_kernels.linear_logprob.triton.tuning import plan_of

JOURNAL, ROWS = results.FOLDER / "h200.jsonl", results.FOLDER / "h200.csv"


def test_the_tuning_table_has_taken_over_what_won() -> None:
    """Word for word, and nothing else that the card did not show."""
    assert winners.table(Journal(JOURNAL)) == ("", [])
    assert plan_of("sm_90", "forward", 16_383) == "triton"
    assert plan_of("sm_90", "forward", 16_384) == "gluon"
    assert plan_of("sm_90", "dlogits", 10**6) == "triton"


def test_without_the_plan_the_record_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = json.loads(winners.PRESENT.read_text()) | {"plans": {}}
    (tmp_path / "tuning.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(winners, "PRESENT", tmp_path / "tuning.json")
    assert winners.table(Journal(JOURNAL))[1] == ["plans.sm_90.forward: gluon from 16384 rows"]


def test_the_page_holds_the_tables_of_the_record() -> None:
    text = summary.PAGE.read_text()
    assert summary.put(text, summary.tables(results.read(ROWS), ROWS)) == text


def test_rows_that_make_no_tables(tmp_path: Path) -> None:
    shutil.copy(results.FOLDER / "cpu-views.csv", tmp_path / "views.csv")
    with pytest.raises(ValueError, match="expected times of roma_loss and linear_logprob"):
        summary.tables(results.read(tmp_path / "views.csv"), tmp_path / "views.csv")
    with pytest.raises(ValueError, match="put the markers back"):
        summary.put("no markers", "")


def test_no_exact_kernel_can_meet_the_bar_of_the_loss() -> None:
    """What docs/BENCHMARKS.md says: the FLOP that any must do take longer than the bar allows."""
    rows = [r for r in results.read(ROWS) if r["op"] == "roma_loss" and bars.timed(r)]
    base = [r for r in rows if r["tokens"] == "4096" and r["worst_over"] == "sequence"]
    fastest = min(float(r["ms_p50"]) for r in base if not r["provider"].startswith(bars.OURS))
    product = float(Journal(JOURNAL).rows("facts")["product"]["tflops"])
    least = float(base[0]["useful_gflop"]) / product
    assert fastest / bars.LOSS < 50 < 65 < least < fastest
