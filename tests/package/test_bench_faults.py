"""Nothing that a candidate does, ours or a peer's, costs more than its own row."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.planted import FAULTS, KILLED, REFUSED, SLEEP

from bench import results
from bench import run as runner
from bench.job import Job, Options
from bench.supervise import Cut, Fault, Worker
from bench.variants import Variant

TESTS = Path(__file__).parents[1]
LIMIT = 3.0  # seconds; what is right takes less than one
# Ours may go at each of these points; what is said of it is the same code as of a peer.
OURS_GOES = {
    "wrong values": "before it is timed",
    "wrong third": "when it warms up",
    "raises in a round": "when it is timed",
    "exits": "with its process, before it is timed",
    "hangs in a round": "with its process, when it is timed",
}
SECONDS = f"1000.{os.getpid()}"
GOOD = ("naive fp32", "naive")


def options(add: str, *providers: str, **others: object) -> Options:
    return Options(
        "cpu", rounds=3, seconds=60.0, limit=LIMIT, with_memory=False,
        add=(f"support.{add}",), providers=(*GOOD, *providers), **others,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setenv(SLEEP, SECONDS)


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
    assert not sleepers()


@pytest.mark.slow
def test_ours(tmp_path: Path) -> None:
    """The same of ours; the peers have times, and no ratio to what is not there."""
    variants = [
        Variant("linear_logprob", "both", 16, 1, 64, vocab=500 + list(FAULTS).index(name))
        for name in OURS_GOES
    ]
    out = tmp_path / "run.csv"
    runner.run(variants, options("planted_ours"), out)
    rows = results.read(out)
    for variant, name in zip(variants, OURS_GOES, strict=True):
        found = table([row for row in rows if row["vocab"] == str(variant.vocab)])
        assert is_reason(found["roma"], name), found["roma"]["reason"]
        for peer in GOOD:
            assert found[peer]["rounds"] == "3" and not found[peer]["ratio"]
            assert runner.verdict(found[peer]) == "–"


@pytest.mark.slow
def test_the_whole_loss(tmp_path: Path) -> None:
    """Ours wrong, what completes the peers failing, a process spoilt: the peers have times."""
    variant, out = Variant("roma_loss", "both", 32, 2, 64, 1000), tmp_path / "run.csv"
    runner.run([variant], options("planted_loss", "naive fp32 active", "spoils"), out)
    found = table(results.read(out))
    assert set(found) == {"roma", "roma_loss_from_logp", "spoils", *GOOD, "naive fp32 active"}
    off = r"refused: dhidden \S+ exceeds \S+ in its warm-up"
    assert re.fullmatch(off, found["roma"]["reason"])
    said = "fails in its comparison: RuntimeError: no kernel image"
    assert found["roma_loss_from_logp"]["reason"] == said
    said = "fails in its forward: RuntimeError: CUDA error: an illegal memory access"
    assert found["spoils"]["reason"] == said
    for name in (*GOOD, "naive fp32 active"):
        assert found[name]["rounds"] == "3" and found[name]["completion"] == "torch"


@pytest.mark.slow
def test_data(tmp_path: Path) -> None:
    """Too large, refused or fatal, its variant has a row for every candidate; the next goes on."""
    variants = [
        Variant("linear_logprob", "both", 2**20, 4, 2**16, 2**18),
        Variant("linear_logprob", "both", 16, 1, 64, KILLED),
        Variant("roma_loss", "both", 16, 1, 64, REFUSED),
        # All logits of 1024 rows are 16 MiB in fp32; ours takes two tiles.
        Variant("linear_logprob", "both", 256, 3, 8, 4096),
    ]
    out = tmp_path / "run.csv"
    runner.run(variants, options("planted_data", memory_limit=0.03), out)
    rows = results.read(out)
    large, killed, refused, fine = (
        table([row for row in rows if row["vocab"] == str(v.vocab)]) for v in variants
    )
    for found in (large, killed, refused, fine):
        assert set(found) == {"roma", *GOOD}
    for name in found:
        assert re.fullmatch(r"its data: needs \S+ GiB, 0.03 are free", large[name]["reason"])
        assert killed[name]["reason"] == "no data: ended its process: code 9 in its data"
        assert refused[name]["reason"] == "no data: fails in its data: RuntimeError: no such file"
    assert fine["roma"]["ms_p50"]
    for name in GOOD:
        assert re.fullmatch(r"needs 0\.04\S+ GiB, 0\.03 are free", fine[name]["reason"])


@pytest.mark.slow
def test_a_card_in_outline(tmp_path: Path) -> None:
    """What a worker does on a GPU only, with torch's functions for one replaced."""
    variants = [
        Variant("linear_logprob", "forward", 64, 0, 64, 1000, among="card"),
        Variant("linear_logprob", "both", 256, 3, 8, 8192),
        Variant("view_loss", "both", 64, 2, 64, 999),
    ]
    how = replace(options("planted_card", "eager", "roma vendor"), device="cuda")
    rows = runner.run(variants, how, tmp_path / "run.csv")
    head, large, loss = (table([r for r in rows if r["vocab"] == str(v.vocab)]) for v in variants)
    assert head["roma"]["machine"] == "a card" and head["roma"]["l2_mib"] == "50"
    assert head["roma"]["multiprocessors"] == "132" and head["roma"]["driver"] == "580"
    assert head["roma"]["temperature_before_c"] == "40"
    assert head["roma"]["temperature_after_c"] == "41"
    assert head["roma"]["extra_mib"] == head["naive"]["extra_mib"] == "7.0"
    assert head["roma vendor"]["ms_p50"]
    assert large["naive fp32"]["reason"].endswith("GiB, 0.0684 are free")
    assert loss["eager"]["ms_p50"] and loss["roma"]["rounds"] == "3"


def scripted(
    monkeypatch: pytest.MonkeyPatch, script: Callable[[Job], Iterator[dict[str, object]]]
) -> list[Job]:
    """Workers that say what a script has; the jobs that they were given."""
    jobs: list[Job] = []

    class Scripted:
        def __init__(self, job: Job) -> None:
            jobs.append(job)

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def events(self, until: float) -> Iterator[dict[str, object]]:
            return script(jobs[-1])

    monkeypatch.setattr(runner, "Worker", Scripted)
    return jobs


def test_a_run_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant is there with all of its times or with none; what has a reason is not repeated."""
    first, second = (Variant("linear_logprob", "forward", n, 0, 64, 1000) for n in (16, 32))

    def script(job: Job) -> Iterator[dict[str, object]]:
        """The first variant is timed; of the second one a candidate is refused."""
        yield {"event": "machine", "columns": {"machine": "a CPU"}}
        for number in range(len(job.variants)):
            yield {"event": "variant", "names": ["roma", "naive"]}
            if len(job.variants) - number == 2:
                yield {"event": "rows", "rows": [TIMED]}
                yield {"event": "done"}
        if "naive" not in job.gone[-1]:
            why = "hangs: so long"
            yield {"event": "refused", "name": "naive", "reason": why, "held": True}
        yield {"event": "round", "ms": {"roma": 1.0}}
        raise Cut

    jobs = scripted(monkeypatch, script)
    out, how = tmp_path / "run.csv", Options("cpu", 3, 1.0)
    for resume, retry in ((False, False), (True, False), (True, True)):
        runner.run([first, second], how, out, resume=resume, retry=retry, minutes=1)
        rows = [(r["tokens"], r["provider"], r.get("ms_p50", "")) for r in results.read(out)]
        assert rows == [("16", "roma", "2"), ("32", "naive", "")]
    assert [job.variants for job in jobs] == [[first, second], [second], [second]]
    assert [job.gone[-1] for job in jobs] == [{}, {"naive": "hangs: so long"}, {}]


def test_what_a_worker_had_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and comparisons reach the next worker; the culprit does not run again."""
    variant = Variant("linear_logprob", "forward", 16, 0, 64, 1000)

    def script(job: Job) -> Iterator[dict[str, object]]:
        yield {"event": "machine", "columns": {"machine": "a CPU"}}
        yield {"event": "variant", "names": ["roma", "naive"]}
        if job.gone[0]:
            yield {"event": "rows", "rows": [TIMED]}
            yield {"event": "done"}
            yield {"event": "end"}
            return
        yield {"event": "held", "name": "roma", "errors": {"logp_rms": 1.0}}
        yield {"event": "round", "ms": {"roma": 1.0, "naive": 2.0}}
        yield {"event": "start", "what": "round 2", "name": "naive", "held": False, "limit": 1}
        raise Fault("killed its process: SIGBUS in its round 2")

    jobs = scripted(monkeypatch, script)
    rows = table(runner.run([variant], Options("cpu", 3, 1.0), tmp_path / "run.csv"))
    assert rows["naive"]["reason"] == "killed its process: SIGBUS in its round 2"
    assert rows["roma"]["ms_p50"] == "2"
    assert jobs[1].gone == [{"naive": rows["naive"]["reason"]}]
    assert jobs[1].rounds == [{"roma": 1.0, "naive": 2.0}]
    assert jobs[1].errors == {"roma": {"logp_rms": 1.0}} and not jobs[1].machine
    assert Job.from_json(jobs[1].to_json()) == jobs[1]


TIMED = {
    "provider": "roma", "ms_p20": "1", "ms_p50": "2", "ms_p80": "3", "tflops": "1", "extra_mib": "",
}  # fmt: skip


def test_a_worker_goes_with_its_time() -> None:
    with Worker(Job(Options("cpu", 3, 1.0), [], [])) as worker:
        with pytest.raises(Cut):
            list(worker.events(until=0.0))
    assert not alive(worker.pid)


def test_nothing_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A machine on which no worker starts is an error, not a table of faults."""
    variant = Variant("linear_logprob", "forward", 16, 0, 64, 1000)
    with pytest.raises(RuntimeError, match="no worker starts: the last one ended its process"):
        runner.run([variant], options("planted_by_nobody"), tmp_path / "run.csv")
    assert "No module named 'support.planted_by_nobody'" in capfd.readouterr().err
    assert not (tmp_path / "run.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_all(sent: signal.Signals, tmp_path: Path) -> None:
    """Also a worker that hangs; and one whose parent was killed outright."""
    command = [sys.executable, "-m", "bench", "--preset", "smoke", "--op", "linear_logprob"]
    command += ["--providers", "hangs", "--add", "support.planted_peers", "--limit", "1000"]
    command += ["--out", str(tmp_path / "run.csv")]
    run = subprocess.Popen(command, cwd=TESTS.parent)
    try:
        wait_for(lambda: bool(sleepers()), 60)  # the worker hangs, with a process of its own
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        (worker,) = map(int, children.read_text().split())
        run.send_signal(sent)
        assert run.wait(10) == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        wait_for(lambda: not alive(worker), 10)
        if sent == signal.SIGINT:
            assert not sleepers()
    finally:
        for pid in sleepers():
            os.kill(pid, signal.SIGKILL)


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sleepers() -> list[int]:
    """What a hanging candidate has started."""
    done = subprocess.run(
        ["pgrep", "-fx", f"sleep {SECONDS}"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in done.stdout.split()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits to be counted, does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
