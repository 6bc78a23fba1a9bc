"""TRL's own tests of its GRPO trainer, with another trainer in its place.

    git clone --branch v1.16.0 --depth 1 https://github.com/huggingface/trl
    python tests/trl_suite/run.py --tests trl/tests                        # ours with ROMA off
    python tests/trl_suite/run.py --tests trl/tests --trainer on -k VLM    # ... and on
    python tests/trl_suite/run.py --tests trl/tests --trainer stock        # TRL's against itself

runs tests/test_grpo_trainer.py of that checkout in two processes, with TRL's `GRPOTrainer` and
`GRPOConfig` and with others under those names (swap.py lists them), and holds that

* every test that passes with TRL's passes with the other;
* with ROMA off, what it logs (losses, gradient norms, rewards) is equal bit for bit.

Exit status 1 otherwise. What follows the options goes to pytest: `-k`, `-n 2`, `-x`. The Hub is not
asked: stand_ins.py builds the models and datasets that the tests load. Wanted: TRL with peft,
datasets, Pillow, pytest; jmespath for the tests of tools, which are skipped without it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PASSED = ("passed", "xfailed")
Record = dict[str, dict[str, Any]]


def run(trainer: str, tests: Path, work: Path, extra: list[str]) -> Record:
    """One run of the suite in a process of its own.

    Args:
        trainer: a key of swap.TRAINERS.
        tests: the folder that holds test_grpo_trainer.py.
        work: the folder of the stand-ins; the tests run there.
        extra: further arguments of pytest.

    Returns:
        {test: {outcome, seconds, why, logged}}.

    Raises:
        SystemExit: pytest could not run.
    """
    record = work / f"{trainer}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(tests / "test_grpo_trainer.py"), "-q"]
    command += ["-p", "trl_suite.swap", "-p", "no:cacheprovider", "--tb=short", *extra]
    environment = settings(work) | {
        "TRL_SUITE_TRAINER": trainer,
        "TRL_SUITE_HOME": str(work),
        "TRL_SUITE_RECORD": str(record),
    }
    with (work / f"{trainer}.log").open("w") as log:
        done = subprocess.run(
            command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode not in (0, 1) or not record.exists():
        tail = (work / f"{trainer}.log").read_text()[-2000:]
        sys.exit(f"pytest with {trainer!r}: status {done.returncode}, no result\n{tail}")
    return json.loads(record.read_text())


def settings(work: Path) -> dict[str, str]:
    """The environment of a child: no Hub, caches of its own, one thread, so that runs agree."""
    path = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
        "HF_HOME": str(work / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),  # logits of 150 000 words: keep their pages
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def compare(stock: Record, other: Record, *, numbers: bool) -> list[str]:
    """What the other trainer lost.

    Args:
        stock: the run with TRL's own.
        other: the run with the other.
        numbers: hold the logged numbers to be equal, too.

    Returns:
        A line for each test that passes with TRL's and not with the other, and, with `numbers`,
        for each that passes with both and logged something else. Empty: nothing was lost.
    """
    lost = []
    for name, theirs in stock.items():
        if theirs["outcome"] not in PASSED:
            continue
        ours = other.get(name, {"outcome": "not run", "why": ""})
        if ours["outcome"] not in PASSED:
            lost.append(f"{name}: {ours['outcome']}: {ours['why']}")
        elif numbers and (told := difference(theirs["logged"], ours["logged"])):
            lost.append(f"{name}: {told}")
    return lost


def difference(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """The first number that two tests did not log alike; empty if there is none."""
    if len(theirs) != len(ours):
        return f"logged {len(theirs)} times with TRL's, {len(ours)} times with the other"
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return f"entry {step} of the log, {key}: {a.get(key)} became {b.get(key)}"
    return ""


def table(runs: dict[str, Record]) -> str:
    """Counts by trainer, and what did not pass with TRL's, by its reason."""
    lines = [f"{'trainer':12}{'passed':>8}{'failed':>8}{'skipped':>9}{'xfailed':>9}{'seconds':>9}"]
    for trainer, record in runs.items():
        count = Counter(test["outcome"] for test in record.values())
        cells = f"{count['passed']:8}{count['failed']:8}{count['skipped']:9}{count['xfailed']:9}"
        lines.append(f"{trainer:12}{cells}{sum(t['seconds'] for t in record.values()):9.0f}")
    stock = runs["stock"]
    compared = sum(1 for test in stock.values() if test["outcome"] in PASSED and test["logged"])
    lines += ["", f"{compared} of TRL's passing tests log numbers"]
    reasons = Counter(t["why"] for t in stock.values() if t["outcome"] == "skipped")
    lines += [f"{number:4} skipped: {why}" for why, number in reasons.most_common()]
    lines += [f"     fails with TRL's: {n}: {t['why']}" for n, t in stock.items() if failed(t)]
    return "\n".join(lines)


def failed(test: dict[str, Any]) -> bool:
    """Whether a test ran and did not pass."""
    return test["outcome"] == "failed"


def main(arguments: list[str] | None = None) -> int:
    """Build, run, run, compare; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", type=Path, required=True, help="the tests folder of a checkout")
    parser.add_argument("--trainer", default="off", help="off, on, stock, hair or broken")
    parser.add_argument("--work", type=Path, help="keep stand-ins, logs and records here")
    parser.add_argument("--stock", type=Path, help="the record of TRL's own run of the same tests")
    args, extra = parser.parse_known_args(arguments)
    tests = args.tests.resolve()
    if not (tests / "test_grpo_trainer.py").is_file():
        parser.error(f"--tests: expected a folder with test_grpo_trainer.py, got {tests}")
    with tempfile.TemporaryDirectory(prefix="trl_suite_") as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        build = [sys.executable, "-m", "trl_suite.stand_ins", str(work)]
        subprocess.run(build, check=True, env=settings(work), stderr=subprocess.DEVNULL)
        if args.stock:
            stock = json.loads(args.stock.read_text())
        else:
            stock = run("stock", tests, work, extra)
        other = run(args.trainer, tests, work, extra)
    numbers = args.trainer != "on"  # with views the numbers differ: that is the method
    again = f"{args.trainer} again" if args.trainer == "stock" else args.trainer
    print(table({"stock": stock, again: other}))
    lost = compare(stock, other, numbers=numbers)
    print(f"\n{len(lost)} lost" + "".join(f"\n  {line}" for line in lost))
    return 1 if lost or not any(t["outcome"] in PASSED for t in stock.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
