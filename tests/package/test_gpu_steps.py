"""`make gpu`: whatever a step does, the others run, and a cut at any moment loses nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import processes
from bench.gpu import budget, runner, table
from bench.gpu.budget import Part, Step
from bench.gpu.journal import Journal

ROOT = Path(__file__).parents[2]
SAY = "from bench.gpu.journal import start, tell, done\n"


def part(name: str, script: str, **how: Any) -> Part:
    options = {"expect": 1.0, "limit": 20.0} | how
    return Part(name, (sys.executable, "-c", script), **options)


def counting(folder: Path, name: str, then: str = "") -> str:
    """A script that leaves a mark each time it runs."""
    return f"open({str(folder / name)!r}, 'a').write('x')\n{SAY}{then}\ntell({name!r}, ms=1.0)"


def marks(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "marks"
    made.mkdir()
    return made


def page(out: Path) -> str:
    return (out / table.PAGE).read_text()


# What a part may do


FAULTS = {
    "an error": ("raise ValueError('no such plan')", {}, "failed", "ValueError: no such plan"),
    "an exit code": ("import sys; sys.exit(7)", {}, "failed", "exit code 7"),
    "its death": ("import os; os.kill(os.getpid(), 9)", {}, "failed", "died of SIGKILL"),
    "a bad access": ("import ctypes; ctypes.string_at(0)", {}, "failed", "died of SIGSEGV"),
    "a hang": ("while True: pass", {"limit": 0.6}, "timeout", "killed after"),
    "silence": ("import time; time.sleep(60)", {"silence": 0.5}, "timeout", "said nothing"),
    "chatter without end": (
        "while True: print('again', flush=True)", {"limit": 0.7}, "timeout", "last: again"
    ),
    "bytes": (
        "import os; os.write(1, bytes(range(256)) * 999)\n"
        "os.write(1, b'\\n@row \\xff\\n@row [1]\\n@row {\"a\": 1}\\n@start\\n')",
        {}, "ok", "",
    ),
    "an item that is wrong": (SAY + "tell('x', 'failed', reason='dh')", {}, "failed", "x"),
    "what it cannot": ("print('no counters for you'); exit(3)", {}, "skipped", "no counters"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_part_costs_itself_alone(fault: str, tmp_path: Path, folder: Path) -> None:
    script, how, status, reason = FAULTS[fault]
    run = runner.Runner(tmp_path / "out")
    run.run([Step("first", "", (part("bad", script, **how),)),
             Step("second", "", (part("good", counting(folder, "good")),))])  # fmt: skip
    end = run.journal.end("first", "bad")
    assert end is not None and end["status"] == status and reason in end["reason"]
    assert run.journal.over("second", "good") and marks(folder) == {"good": 1}
    assert f"| first | bad | {status} |" in page(run.out)
    assert (run.out / runner.LOG).stat().st_size < 2 * runner._LOG_BYTES


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    """Also in a session of its own, which a signal to the process group does not reach."""
    script = (
        "import subprocess, sys, time\n"
        "for how in (False, True):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'],\n"
        "                             start_new_session=how)\n"
        "    print(child.pid, flush=True)\n"
        "time.sleep(99)\n"
    )
    heard: list[str] = []
    end = processes.watch([sys.executable, "-c", script], heard.append, seconds=1.5)
    assert end.code is None and len(heard) == 2
    deadline = time.monotonic() + 5
    while any(_alive(int(pid)) for pid in heard) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(int(pid)) for pid in heard)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_process_left_behind_does_not_hold_its_part(tmp_path: Path) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '60'])"
    begin = time.monotonic()
    assert processes.watch([sys.executable, "-c", script], lambda line: None, seconds=30).code == 0
    assert time.monotonic() - begin < 10


def test_an_item_that_ends_its_process_costs_itself_alone(tmp_path: Path, folder: Path) -> None:
    """It has a line with its reason; the items behind it run in a new process, none runs twice."""
    script = SAY + (
        "import os\n"
        "for item in ('a', 'b', 'c', 'd'):\n"
        "    if item in done(): continue\n"
        f"    open({str(folder)!r} + '/' + item, 'a').write('x')\n"
        "    start(item)\n"
        "    if item == 'b': os.abort()\n"
        "    tell(item, ms=1.0)\n"
    )
    run = runner.Runner(tmp_path / "out")
    run.run([Step("s", "", (part("p", script, restarts=3),))])
    rows = run.journal.rows("s")
    assert {item: row["status"] for item, row in rows.items()} == {
        "a": "ok", "b": "crashed", "c": "ok", "d": "ok"
    }  # fmt: skip
    assert "SIGABRT" in rows["b"]["reason"] and marks(folder) == dict.fromkeys("abcd", 1)
    end = run.journal.end("s", "p")
    assert end is not None and (end["status"], end["reason"]) == ("failed", "b")


def test_threads_that_speak_at_once(tmp_path: Path) -> None:
    """And somebody else on the pipe who never ends a line."""
    script = SAY + (
        "import os\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "def speak(i):\n"
        "    start(f'item {i}')\n"
        "    os.write(1, b'.')\n"
        "    tell(f'item {i}', text='x' * 300)\n"
        "with ThreadPoolExecutor(8) as threads: list(threads.map(speak, range(200)))\n"
    )
    run = runner.Runner(tmp_path / "out")
    run.run([Step("s", "", (part("p", script),))])
    assert len(run.journal.rows("s")) == 200


def test_too_many_deaths_end_a_part(tmp_path: Path) -> None:
    script = SAY + "import os\nstart(str(len(done())))\nos.abort()"
    run = runner.Runner(tmp_path / "out")
    run.run([Step("s", "", (part("p", script, restarts=2),))])
    assert len(run.journal.rows("s")) == 3
    end = run.journal.end("s", "p")
    assert end is not None and end["status"] == "failed" and "SIGABRT" in end["reason"]


# Cuts


def three(folder: Path) -> list[Step]:
    return [
        Step("a", "", (part("1", counting(folder, "1")), part("2", counting(folder, "2")))),
        Step("b", "", (part("3", counting(folder, "3")),)),
    ]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_cut_between_parts(after: int, tmp_path: Path, folder: Path) -> None:
    out, begun = tmp_path / "out", 0

    def cut(line: str) -> None:
        nonlocal begun
        if line.startswith("…"):
            if begun == after:
                raise KeyboardInterrupt
            begun += 1

    if after < 3:
        with pytest.raises(KeyboardInterrupt):
            runner.Runner(out).run(three(folder), cut)
    else:
        runner.Runner(out).run(three(folder), cut)
    assert sum(marks(folder).values()) == after
    runner.Runner(out).run(three(folder))
    assert marks(folder) == {"1": 1, "2": 1, "3": 1}
    assert set(Journal(out / runner.JOURNAL).rows("a")) == {"1", "2"}


def test_a_kill_in_the_middle_of_a_part(tmp_path: Path, folder: Path) -> None:
    """Of the whole program, by a signal that nobody can catch, and a line torn in two."""
    script = SAY + (
        "import time\n"
        "for item in ('a', 'b', 'c', 'd'):\n"
        "    if item in done(): continue\n"
        f"    open({str(folder)!r} + '/' + item, 'a').write('x')\n"
        "    tell(item, ms=1.0)\n"
        "    if item == 'b': time.sleep(30)\n"
    )
    made = Step("s", "", (part("p", script),))
    program = (
        "import sys\nfrom pathlib import Path\nfrom bench.gpu import runner\n"
        "from bench.gpu.budget import Part, Step\n"
        f"runner.Runner(Path({str(tmp_path / 'out')!r})).run([{made!r}])\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program], env=processes.environment())
    deadline = time.monotonic() + 20
    while marks(folder) != {"a": 1, "b": 1} and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    children = processes.descendants(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert children and marks(folder) == {"a": 1, "b": 1}
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in children)  # nothing is left on the GPU
    journal = tmp_path / "out" / runner.JOURNAL
    with journal.open("a") as file:
        file.write('{"kind": "row", "step": "s", "item": "c", "m')
    again = runner.Runner(tmp_path / "out")
    assert set(again.journal.rows("s")) == {"a", "b"}
    again.run([made])
    assert marks(folder) == dict.fromkeys("abcd", 1)
    assert set(Journal(journal).rows("s")) == set("abcd")
    assert Journal(journal).over("s", "p")


def test_time_that_runs_out(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that would not end in time is not started, one behind it that would is; an
    interruptible one is cut, not blamed, and goes on."""
    slow = SAY + "import time\nn = len(done())\ntell(f'x{n}')\ntime.sleep(0 if n else 30)"
    made = [Step("s", "", (
        part("long", counting(folder, "long"), expect=50.0),
        part("short", counting(folder, "short"), expect=0.1),
    )), Step("t", "", (part("cut", slow, expect=9.0, limit=99.0, least=1.0),))]  # fmt: skip
    monkeypatch.setattr(budget, "PACK", 0.7)
    run = runner.Runner(tmp_path / "out", seconds=5.0)
    said: list[str] = []
    run.run(made, said.append)
    assert marks(folder) == {"short": 1} and run.left > 0
    assert any("long: not in the" in line for line in said)
    end = run.journal.end("t", "cut")
    assert end is not None and end["status"] == "cut" and not run.journal.over("t", "cut")
    again = runner.Runner(tmp_path / "out")
    again.run(made)
    assert marks(folder) == {"short": 1, "long": 1}
    assert again.journal.over("t", "cut") and set(again.journal.rows("t")) == {"x0", "x1"}


def test_more_to_do_is_no_end(tmp_path: Path, folder: Path) -> None:
    script = f"import os, sys\nopen({str(folder / 'n')!r}, 'a').write('x')\n" + (
        f"sys.exit(4 if os.path.getsize({str(folder / 'n')!r}) < 2 else 0)"
    )
    made = [Step("s", "", (part("p", script, least=1.0),))]
    for status in ("cut", "ok"):
        run = runner.Runner(tmp_path / "out")
        run.run(made)
        end = run.journal.end("s", "p")
        assert end is not None and end["status"] == status


def test_retry_forgets_what_failed_alone(tmp_path: Path, folder: Path) -> None:
    made = [Step("s", "", (
        part("good", counting(folder, "good")),
        part("bad", counting(folder, "bad", then="tell('worse', 'failed')\nexit(1)")),
    ))]  # fmt: skip
    for retry in (False, False, True):
        run = runner.Runner(tmp_path / "out")
        run.journal.append("call", retry=retry)
        if retry:
            assert set(run.journal.rows("s")) == {"good"}
        run.run(made)
    assert marks(folder) == {"good": 1, "bad": 2}


def test_the_archive_goes_on_elsewhere(tmp_path: Path, folder: Path) -> None:
    first = runner.Runner(tmp_path / "one")
    first.run(three(folder)[:1])
    archive = tmp_path / "one" / runner.ARCHIVE
    assert not list((tmp_path / "one").glob("*.new"))
    runner.unpack(archive, tmp_path / "two")
    second = runner.Runner(tmp_path / "two")
    second.run(three(folder))
    assert marks(folder) == {"1": 1, "2": 1, "3": 1}
    assert set(second.journal.rows("a")) == {"1", "2"}
    with pytest.raises(ValueError, match="it has results"):
        runner.unpack(archive, tmp_path / "two")
    with pytest.raises(ValueError, match="expected an archive of results"):
        runner.unpack(ROOT / "Makefile", tmp_path / "three")
    assert runner.set_aside(tmp_path / "two") == tmp_path / "two.1"
    assert runner.set_aside(tmp_path / "two") is None


def test_few_small_files(tmp_path: Path, folder: Path) -> None:
    """A rented machine gives back eight files of 16 MiB."""
    flood = "import sys\nfor i in range(300000): print('a line of some length', i)"
    run = runner.Runner(tmp_path / "out")
    (run.out / table.BENCH).write_text("provider,ms_p50\nroma,1\n")
    run.run([*three(folder), Step("c", "", (part("flood", flood),))])
    files = list(run.out.iterdir())
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 2**20


# The program


def test_the_program_on_this_machine(tmp_path: Path) -> None:
    """--plan, and a step that needs a card."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = processes.environment({"OMP_NUM_THREADS": "1"})

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    plan = call("--plan")
    assert (
        plan.returncode == 0 and "sanitizer  memcheck" in plan.stdout and "call 1:" in plan.stdout
    )
    assert "needs a card" in plan.stdout
    run = call("--only", "sanitizer")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| sanitizer | memcheck | skipped | 0 | needs a card |" in page(tmp_path / "out")
    wrong = call("--only", "fact")
    assert wrong.returncode == 2 and "--only: expected some of facts" in wrong.stderr
    part = call("--plan", "--only", "correct:vendor,sanitizer")
    assert "correct    vendor" in part.stdout and "sanitizer  memcheck" in part.stdout
    assert "correct    triton" not in part.stdout and "facts" not in part.stdout
    wrong = call("--only", "sweep:plan")
    assert wrong.returncode == 2 and "got sweep:plan" in wrong.stderr


def test_interrupting_the_program(tmp_path: Path) -> None:
    """A polite end: what ran is cut, and the page says so."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--only", "facts",
               "--out", str(tmp_path / "out")]  # fmt: skip
    started = subprocess.Popen(
        command, cwd=ROOT, env=processes.environment({"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline().startswith("… facts")
    os.kill(started.pid, signal.SIGTERM)
    assert "--resume goes on" in started.stdout.read()
    assert started.wait() == 130
    assert "| facts | cpu | cut |" in page(tmp_path / "out")
    assert math.isfinite(Journal(tmp_path / "out" / runner.JOURNAL).spent("facts", "cpu"))
