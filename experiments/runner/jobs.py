"""Models trained and evaluated in processes of one thread each; what is finished is not run again.

A job's folder holds, beside what the trainer writes, answers.json (what the model answered) and, as
the last file, took.json (steps and times). A job whose folder has both, and a config.yaml that says
what would be run, is finished.
"""

import json
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from roma.train.config import Config, load_config

_DONE = -1  # instead of a step number: trained and evaluated
ANSWER_TOKENS = 16
"""Budget of an answer in an evaluation, tokens; a right one takes 12, with further marks 14."""


@dataclass(frozen=True)
class Arm:
    """A configuration: a file in configs/, and overrides of it."""

    overrides: tuple[str, ...] = ()
    file: str = "demo.yaml"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to train, or a trained one, and the images that it is evaluated on."""

    arm: str
    seed: int
    folder: Path
    """Where its answers go; of a run, the trainer's folder."""
    images: Path
    """A pickle of `roma.evaluate.conditions.DegradedImages`."""
    config: Config | None = None
    """Of the run; None: nothing is trained."""
    model: Path | None = None
    """Evaluated where nothing is trained; None: the one in `folder`."""
    answer_tokens: int = ANSWER_TOKENS
    """Budget of an answer in the evaluation, tokens."""
    attacks: tuple[int, ...] = ()
    """Levels of pool "adversarial" at which it is evaluated too, each against its own attacks."""

    @property
    def name(self) -> str:
        """As said on the console."""
        return f"{self.arm} seed {self.seed}"

    @property
    def answers(self) -> Path:
        """What `roma.evaluate.result.EvalResult.load` reads."""
        return self.folder / "answers.json"

    def took(self) -> dict[str, float] | None:
        """Steps and times of this very job, if it is finished."""
        took, written = self.folder / "took.json", self.folder / "config.yaml"
        if not (took.is_file() and self.answers.is_file()):
            return None
        if self.config is not None and not _says(written, self.config):
            return None
        found: dict[str, float] = json.loads(took.read_text(encoding="utf-8"))
        return found


def _says(path: Path, config: Config) -> bool:
    """Whether a config.yaml means this configuration; a key that it lacks has its default."""
    try:
        return load_config(path) == config
    except (FileNotFoundError, ValueError):  # none, or of another version of the package
        return False


class Runs:
    """Jobs on as many processes as cores; a context.

    Args:
        console: for progress.
        reuse: whether a finished job's results are taken as they are.
    """

    def __init__(self, console: Console, *, reuse: bool = False) -> None:
        """Starts no process yet."""
        self.console, self.reuse = console, reuse
        self._jobs: dict[tuple[str, int], Future[dict[str, float]]] = {}
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def __enter__(self) -> "Runs":
        """Starts the processes, which wait for jobs."""
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        cores = len(os.sched_getaffinity(0))
        with ExitStack() as stack:
            manager = stack.enter_context(context.Manager())
            self._pool = stack.enter_context(ProcessPoolExecutor(cores, context, _one_thread))
            self._bars = stack.enter_context(bars(self.console))
            self._events: Queue[tuple[str, int, int]] = manager.Queue()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the jobs at hand; after an error no further one starts."""
        if error is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._stack.close()

    def start(self, job: Job) -> None:
        """Hands a job to the processes; a finished one is taken as it is and said so."""
        key = (job.arm, job.seed)
        took = job.took() if self.reuse else None
        if took is not None:
            self.console.print(f"{job.name}: finished earlier with these settings, taken as it is")
            self._jobs[key] = Future()
            self._jobs[key].set_result(took)
            return
        total = job.config.trainer.total_steps if job.config else 0
        self._jobs[key] = self._pool.submit(_run, job, self._events)
        self._tasks[key] = self._bars.add_task(job.name, total=total)

    def done(self, arm: str, seed: int) -> bool:
        """Whether a job is finished."""
        return self._jobs[arm, seed].done()

    def took(self, arm: str, seed: int) -> dict[str, float]:
        """Steps and times of a finished job."""
        return self._jobs[arm, seed].result()

    def everything(self) -> dict[tuple[str, int], dict[str, float]]:
        """(arm, seed) → steps and times of all jobs; waits for them."""
        while self.busy():
            pass
        return {key: job.result() for key, job in self._jobs.items()}

    def busy(self) -> bool:
        """Shows progress for a moment; whether a job is still running. Raises what one raised."""
        self._drain()
        for job in self._jobs.values():
            if job.done():
                job.result()
        return not all(job.done() for job in self._jobs.values())

    def _drain(self) -> None:
        deadline = time.monotonic() + 0.3
        while (left := deadline - time.monotonic()) > 0:
            try:
                arm, seed, step = self._events.get(timeout=left)
            except Empty:
                return
            task = self._tasks[arm, seed]
            if step == _DONE:
                if not self.console.is_terminal:  # a log file shows no bars
                    self.console.print(f"{arm} seed {seed}: trained and evaluated")
                total = self._bars.tasks[task].total
                self._bars.update(task, completed=total, description=f"{arm} {seed} ✓")
            else:
                self._bars.update(task, completed=step)


def bars(console: Console) -> Progress:
    """Progress bars with steps and times."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def by_run(took: Mapping[tuple[str, int], dict[str, float]]) -> dict[str, Any]:
    """The same by "<arm>-seed<k>", as report.json has it."""
    return {f"{arm}-seed{seed}": values for (arm, seed), values in took.items()}


def _one_thread() -> None:
    """Set before a worker imports torch and DALI: concurrent runs have one core each."""
    os.environ["OMP_NUM_THREADS"] = os.environ["DALI_NUM_THREADS"] = "1"


def _run(job: Job, events: "Queue[tuple[str, int, int]]") -> dict[str, float]:
    """Trains a job's model, if it is to be trained, and evaluates it, in its own process."""
    import torch

    from roma.evaluate.run import evaluate, policy_answerer
    from roma.models.qwen_vl import Policy
    from roma.train.trainer import train

    torch.set_num_threads(1)
    path, start = job.model or job.folder, time.perf_counter()
    cpu_start = time.process_time()
    if job.config is not None:
        shutil.rmtree(job.folder, ignore_errors=True)

        def tell(step: int, _: Mapping[str, float]) -> None:
            events.put((job.arm, job.seed, step))

        path = train(job.config, progress=tell) / "actor"
    trained, cpu_s = time.perf_counter(), time.process_time() - cpu_start
    images = pickle.loads(job.images.read_bytes())
    policy = Policy.load(path)
    answer = policy_answerer(policy, max_new_tokens=job.answer_tokens)
    found = evaluate(answer, images, batch_size=500)
    if job.attacks:
        found = _with_attacks(found, policy, images.examples, job)
    job.folder.mkdir(parents=True, exist_ok=True)
    found.save(job.answers)
    took = {
        "steps": 0 if job.config is None else job.config.trainer.total_steps,
        "train_s": round(trained - start, 1),
        "train_cpu_s": round(cpu_s, 1),
        "evaluate_s": round(time.perf_counter() - trained, 1),
    }
    (job.folder / "took.json").write_text(json.dumps(took) + "\n", encoding="utf-8")
    events.put((job.arm, job.seed, _DONE))
    return took


def _with_attacks(found: Any, policy: Any, examples: Sequence[Any], job: Job) -> Any:
    """A result, and the model's answers to images that PGD made against it."""
    from roma.evaluate.attack import evaluate_attacked
    from roma.evaluate.conditions import cells_of
    from roma.evaluate.result import EvalResult

    cells = cells_of(["adversarial"], job.attacks)
    tokens, batch = job.answer_tokens, len(examples)
    own = evaluate_attacked(policy, examples, cells, max_new_tokens=tokens, batch_size=batch)
    return EvalResult(found.ids, found.cells | {cell: own.cells[cell] for cell in cells})
