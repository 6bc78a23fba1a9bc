"""Nothing that a candidate does, ours or a peer's, costs more than its own row."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.planted import FAULTS

from bench import results
from bench import run as runner
from bench.job import Options
from bench.variants import Variant

TESTS = Path(__file__).parents[1]
LIMIT = 5.0  # seconds; what is right takes less than one
GOOD = ("naive fp32", "naive")


def options(add: str, *providers: str, **others: object) -> Options:
    return Options(
        "cpu", rounds=3, seconds=60.0, limit=LIMIT, with_memory=False,
        add=(f"support.{add}",), providers=(*GOOD, *providers), **others,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


def table(rows: list[results.Row]) -> dict[str, results.Row]:
    found = {row["provider"]: row for row in rows}
    assert len(found) == len(rows), "a candidate has two rows"
    return found


def is_reason(row: results.Row, name: str) -> bool:
    return re.match(FAULTS[name][1].replace("LIMIT", f"{LIMIT:g}"), row["reason"]) is not None


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    """A row with a reason for each fault; the others are timed to the end, every round of them."""
    variant = Variant("linear_logprob", "both", 16, 1, 64, 1000)
    out = tmp_path / "run.csv"
    runner.run([variant], options("planted_peers", *FAULTS), out)
    found = table(results.read(out))
    assert set(found) == {"roma", *GOOD, *FAULTS}
    for name in FAULTS:
        assert is_reason(found[name], name), found[name]["reason"]
        assert not found[name]["ms_p50"]
    for name in ("roma", *GOOD):
        assert found[name]["rounds"] == "3" and float(found[name]["ratio"]) > 0
        assert found[name]["machine"] and not found[name]["reason"]


@pytest.mark.slow
def test_ours(tmp_path: Path) -> None:
    """The same of ours; the peers have times, and no ratio to what is not there."""
    variants = [
        Variant("linear_logprob", "both", 16, 1, 64, vocab=500 + i) for i in range(len(FAULTS))
    ]
    out = tmp_path / "run.csv"
    runner.run(variants, options("planted_ours"), out)
    rows = results.read(out)
    for variant, name in zip(variants, FAULTS, strict=True):
        found = table([row for row in rows if row["vocab"] == str(variant.vocab)])
        assert is_reason(found["roma"], name), found["roma"]["reason"]
        for peer in GOOD:
            assert found[peer]["rounds"] == "3" and not found[peer]["ratio"]
            assert runner.verdict(found[peer]) == "–"
