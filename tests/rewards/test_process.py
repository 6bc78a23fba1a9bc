"""A reward function of a user's own: what raises, hangs, dies or returns nonsense marks its row."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roma.rewards import Failed, ProcessReward, Score

USER = '''
import os, sys, time

def compute_score(rows):
    """Does what the response says; a batch is scored relative to its size."""
    with open(__file__ + ".calls", "a") as log:
        log.write(f"{len(rows)}\\n")
    print("a line on stdout")
    scores = []
    for row in rows:
        say = row["response"]
        if say == "raise":
            raise ZeroDivisionError("no\\nway")
        if say == "exit":
            sys.exit("enough")
        if say == "die":
            os.kill(os.getpid(), 11)
        if say == "hang":
            time.sleep(3600)
        if say == "spin":  # never gives way to another thread of Python for long
            while True:
                pass
        if say == "slow":
            time.sleep(0.25)
        score = {"overall": len(rows), "format": True, "accuracy": say == "good", "own": 3}
        if say == "nan":
            score["overall"] = float("nan")
        if say == "huge":
            score["overall"] = 10**400
        if say == "no key":
            del score["accuracy"]
        if say == "text":
            score["own"] = "three"
        if say == "failed":
            score["failed"] = 0.0
        if say == "list":
            score = [1.0]
        scores.append(score)
    return scores + scores[:1] if rows[0]["response"] == "long" else scores
'''
TIMEOUT = 1.0
SPARE = 20.0  # two shared cores: starting Python anew takes a second or so when all are busy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "own.py"
    made.write_text(USER)
    return made


@pytest.fixture
def reward(path: Path) -> Iterator[ProcessReward]:
    made = ProcessReward(f"{path}:compute_score", timeout_s=TIMEOUT)
    yield made
    made.close()


def scored(reward: ProcessReward, *says: str) -> list[Score | Failed]:
    return list(reward([{"response": say, "ground_truth": "1"} for say in says]))


def calls(path: Path) -> list[int]:
    return [int(line) for line in Path(f"{path}.calls").read_text().split()]


def good(batch: int) -> Score:
    return {"overall": float(batch), "format": 1.0, "accuracy": 1.0, "own": 3.0}


def test_a_batch_is_one_call(reward: ProcessReward, path: Path) -> None:
    assert scored(reward, "good", "good", "bad") == [good(3), good(3), good(3) | {"accuracy": 0.0}]
    assert scored(reward, "good") == [good(1)] and scored(reward) == []
    assert calls(path) == [3, 1]


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        ("nan", "a finite number under 'overall', got nan"),
        ("huge", "a finite number under 'overall', got 1000"),
        ("no key", "add 'accuracy'"),
        ("text", "a finite number under 'own', got 'three'"),
        ("failed", "no part 'failed'"),
    ],
)
def test_a_bad_score_marks_its_row_alone(
    reward: ProcessReward, path: Path, say: str, reason: str
) -> None:
    first, marked, last = scored(reward, "good", say, "good")
    assert first == last == good(3) and calls(path) == [3]
    assert isinstance(marked, Failed) and reason in marked.reason


@pytest.mark.parametrize(
    ("say", "reason"),
    [
        ("raise", "raised ZeroDivisionError: no way"),
        ("exit", "raised SystemExit: enough"),
        ("list", "raised TypeError: "),
        ("die", "its process ended (signal SIGSEGV)"),
        ("hang", "took longer than 1 s"),
        ("spin", "took longer than 1 s"),
    ],
)
def test_a_failed_call_is_made_again_row_by_row(
    reward: ProcessReward, path: Path, say: str, reason: str
) -> None:
    begin = time.monotonic()
    first, marked, last = scored(reward, "good", say, "good")
    assert time.monotonic() - begin < 3 * TIMEOUT + TIMEOUT + SPARE
    assert first == last == good(1) and calls(path) == [3, 1, 1, 1]
    assert isinstance(marked, Failed) and reason in marked.reason
    assert scored(reward, "good", "good") == [good(2)] * 2  # and goes on as before


def test_too_many_scores_are_not_taken(reward: ProcessReward) -> None:
    long, other = scored(reward, "long", "good")
    assert isinstance(long, Failed) and "expected 1 results, got 2" in long.reason
    assert other == good(1)


def test_after_many_cuts_the_rest_of_a_batch_is_not_tried(path: Path) -> None:
    reward = ProcessReward(f"{path}:compute_score", timeout_s=0.1, most_cuts=2, rowwise=True)
    reasons = [
        score.reason
        for score in scored(reward, "hang", "hang", "hang", "good")
        if isinstance(score, Failed)
    ]
    assert (
        reasons
        == ["took longer than 0.1 s"] * 2
        + ["not tried: the reward was cut 2 times in this batch"] * 2
    )
    reward.close()


def test_a_slow_function_gets_its_time_next_time(path: Path) -> None:
    """Two rows of 0.25 s, of which a batch had 0.3 s: from then on it has twice what they took."""
    reward = ProcessReward(f"{path}:compute_score", timeout_s=TIMEOUT)
    reward._together_s = 0.3
    assert scored(reward, "slow", "slow") == [good(1) | {"accuracy": 0.0}] * 2
    assert 1.0 < reward._together_s < SPARE
    assert scored(reward, "slow", "slow") == [good(2) | {"accuracy": 0.0}] * 2
    reward.close()


def test_it_works_beside_threads(reward: ProcessReward) -> None:
    found: list[list[Score | Failed]] = []
    thread = threading.Thread(target=lambda: found.append(scored(reward, "good", "hang")))
    thread.start()
    thread.join(TIMEOUT * 3 + SPARE)
    assert not thread.is_alive() and found[0][0] == good(1) and isinstance(found[0][1], Failed)


def test_what_does_not_load_is_refused_before_the_first_step(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"reward: expected an existing file, got .*none"):
        ProcessReward(f"{tmp_path}/none.py:compute_score")
    with pytest.raises(ValueError, match="did you mean 'compute_score'"):
        ProcessReward(f"{path}:compute_scor")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    with pytest.raises(ValueError, match="loads, got raised ModuleNotFoundError: No module named"):
        ProcessReward(f"{broken}:f")
    broken.write_text("import os; os._exit(3)")
    with pytest.raises(ValueError, match=r"got that its process ended \(exit code 3\)"):
        ProcessReward(f"{broken}:f")
    broken.write_text("while True: pass")
    with pytest.raises(ValueError, match=r"that it loads within 0\.5 s, got nothing"):
        ProcessReward(f"{broken}:f", start_s=0.5)


SCRIPT = """
import os, sys, threading
from roma.rewards import ProcessReward
reward = ProcessReward(sys.argv[1] + ":compute_score", timeout_s=600.0)
print(reward._worker._process.pid, flush=True)
row = {"response": "spin", "ground_truth": "1"}
threading.Thread(target=lambda: reward([row]), daemon=True).start()
sys.stdin.read(1)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_its_process_ends_with_the_run(path: Path, how: str) -> None:
    """Also a hanging one, of a run that was killed; and a script without a main guard runs once."""
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdin and run.stdout
    worker = int(run.stdout.readline())
    deadline = time.monotonic() + SPARE
    while not Path(f"{path}.calls").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker, 0)
    out, _ = run.communicate("x", timeout=SPARE)
    assert "a line on stdout" not in out  # the run's stdout is its own
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if _is_zombie(worker):
            return
        time.sleep(0.05)
    pytest.fail("the reward's process outlived its run")


def _is_zombie(process: int) -> bool:
    """Ended; in a container nobody may ask for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
