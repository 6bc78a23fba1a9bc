"""The demo on digits: data, warm start, four arms over several seeds, a report.

All arms start from one warm-started model and differ in one setting: `grpo` has clean rollouts and
no views, `naive` is GRPO with rollouts on a degraded image, `roma` adds the views to the loss, and
`grpo_equal_time` is GRPO with more steps, by the ratio of the CPU times that ROMA and GRPO took for
that seed (one thread each). All arms are evaluated on the same degraded test images; their scans
were used neither for training nor for tuning.
"""

import math
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
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

from roma.train.config import Config, load_config, to_dict
from roma_kernels.errors import fail

ARMS: dict[str, list[str]] = {
    "grpo": ["algorithm.view_mode=none"],
    "roma": ["algorithm.view_mode=roma"],
    "grpo_equal_time": ["algorithm.view_mode=none"],
    "naive": ["algorithm.view_mode=rollout"],
}
"""Arm → its overrides of configs/demo.yaml."""

POOLS = ("clean", "seen", "unseen")
LEVELS = (1, 2, 3)
_DONE = -1  # instead of a step number: trained and evaluated


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of questions and steps; the defaults are those of docs/DEMO.md."""

    train: int = 8000
    """Training questions."""
    val: int = 1000
    """Validation questions, for learning curves; levels and λ were chosen on them."""
    test: int = 500
    """Test questions per condition."""
    warm_steps: int = 300
    """Steps of the supervised warm start, 32 questions each."""
    steps: int | None = None
    """RL steps of an arm; None: those of configs/demo.yaml."""


def run_demo(
    out: str | Path, *, seeds: Sequence[int] = (0, 1, 2), sizes: Sizes | None = None
) -> Path:
    """Runs the demo and returns the path of its report.html.

    Writes to `out`: report.json, report.html, plots (PNG), data/, base/, and per arm and seed a run
    folder with metrics.jsonl, config.yaml and the last checkpoint. The files of an earlier demo
    there are replaced.

    Args:
        out: the run folder.
        seeds: of the RL runs, at least one.
        sizes: None for the defaults.

    Raises:
        ValueError: no seeds, a seed twice, or no configs/ (run it in a clone).
    """
    if not seeds or len(set(seeds)) < len(seeds):
        fail("seeds", "distinct numbers, at least one", str(list(seeds)), "0,1,2 are customary")
    configs = Path(__file__).resolve().parents[2] / "configs"
    if not (configs / "demo.yaml").is_file():
        fail("configs", "configs/demo.yaml in the clone", "none", "run the demo in a clone")
    run = _Demo(Path(out), configs, list(seeds), sizes or Sizes())
    return run.run()


class _Demo:
    def __init__(self, out: Path, configs: Path, seeds: list[int], sizes: Sizes) -> None:
        self.out, self.configs, self.seeds, self.sizes = out, configs, seeds, sizes
        self.console = Console()
        self.timings: dict[str, Any] = {}
        self.cores = len(os.sched_getaffinity(0))

    def run(self) -> Path:
        """All stages, one after another."""
        self.out.mkdir(parents=True, exist_ok=True)
        for stale in self.out.glob("*-seed*"):
            shutil.rmtree(stale)
        with self._stage("data", "questions about two handwritten digits"):
            self._make_data()
        with self._stage("warm_start", "a small Qwen3-VL, supervised, clean images"):
            self._warm_start()
        with self._stage("degraded_images", "the test images at 28 conditions"):
            images = self._degrade()
        with self._stage("train_and_evaluate", f"{len(ARMS)} arms × {len(self.seeds)} seeds"):
            results = self._train_and_evaluate()
        with self._stage("report", "tables, plots, report.html"):
            return self._report(results, images)

    @contextmanager
    def _stage(self, name: str, what: str) -> Iterator[None]:
        self.console.print(f"[bold]{name.replace('_', ' ')}[/]: {what}")
        start = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - start, 1)

    def _config(self, arm: str, seed: int, steps: int | None = None) -> Config:
        overrides = [
            f"data.train_files={self.out}/data@train",
            f"data.val_files={self.out}/data@val",
            f"algorithm.views.level_table={self.configs}/demo_levels.yaml",
            f"worker.actor.model_path={self.out}/base",
            f"trainer.out={self.out}/{arm}-seed{seed}",
            f"trainer.seed={seed}",
            f"data.seed={seed}",
            "trainer.resume=never",
            "trainer.logger=[file]",
            *ARMS[arm],
        ]
        steps = steps or self.sizes.steps
        return load_config(
            self.configs / "demo.yaml",
            overrides + ([f"trainer.total_steps={steps}"] if steps else []),
        )

    def _make_data(self) -> None:
        from roma.data import write_digits

        sizes, folder = self.sizes, self.out / "data"
        write_digits(folder, train=sizes.train, val=sizes.val, test=sizes.test, overwrite=True)

    def _warm_start(self) -> None:
        from experiments.digits.warm_start import warm_start
        from roma.data import DIGIT_WORDS, load_dataset_rows
        from roma.models.qwen_vl import Policy
        from roma.models.small import build_small_vlm

        base = build_small_vlm(self.out / "base", words=DIGIT_WORDS)
        policy = Policy.load(base)
        with self._bars() as bars:
            task = bars.add_task("warm start", total=self.sizes.warm_steps)
            warm_start(
                policy,
                load_dataset_rows(self.out / "data", split="train"),
                steps=self.sizes.warm_steps,
                batch_size=32,
                progress=lambda step, loss: bars.update(task, completed=step),
            )
        policy.save_pretrained(base)

    def _degrade(self) -> Any:
        from roma.data import load_dataset_rows
        from roma.evaluate.conditions import DegradedImages, cells_of
        from roma.models.qwen_vl import Policy
        from roma.views import load_levels

        table = load_levels(self.configs / "demo_levels.yaml")
        images = DegradedImages(
            load_dataset_rows(self.out / "data", split="test"),
            cells_of(POOLS, LEVELS, table),
            resize=Policy.load(self.out / "base").processor.resize,
            corruptions=table,
        ).make_all()
        (self.out / "test_images.pickle").write_bytes(pickle.dumps(images))
        return images

    def _train_and_evaluate(self) -> dict[str, dict[int, Any]]:
        """Jobs on as many processes as cores, one thread each; returns arm → seed → answers."""
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        steps = self._config("grpo", self.seeds[0]).trainer.total_steps
        with (
            context.Manager() as manager,
            ProcessPoolExecutor(self.cores, context, _one_thread) as pool,
        ):
            events: Queue[tuple[str, int, int]] = manager.Queue()

            def submit(arm: str, seed: int, more: int | None = None) -> Future[dict[str, float]]:
                config = None if arm == "base" else self._config(arm, seed, more)
                return pool.submit(_job, self.out, arm, seed, config, events)

            # GRPO and ROMA of each seed come first: their times give the steps of equal time.
            jobs = {("base", 0): submit("base", 0)}
            for seed in self.seeds:
                jobs |= {(arm, seed): submit(arm, seed) for arm in ("grpo", "roma")}
            waiting = list(self.seeds)
            with self._bars() as bars:
                tasks = {key: bars.add_task("{} {}".format(*key), total=steps) for key in jobs}
                while True:
                    self._drain(events, bars, tasks)
                    for seed in [s for s in waiting if self._timed(jobs, s)]:
                        waiting.remove(seed)
                        more = self._equal_steps(jobs, seed, steps)
                        jobs["grpo_equal_time", seed] = submit("grpo_equal_time", seed, more)
                        jobs["naive", seed] = submit("naive", seed)
                        for key, total in (
                            (("grpo_equal_time", seed), more),
                            (("naive", seed), steps),
                        ):
                            tasks[key] = bars.add_task("{} {}".format(*key), total=total)
                    done, pending = wait(jobs.values(), timeout=0)
                    for job in done:
                        job.result()  # raises what the job raised
                    if not pending and not waiting:
                        break
                self._drain(events, bars, tasks)
        self.timings["runs"] = {
            f"{arm}-seed{seed}": job.result() for (arm, seed), job in jobs.items()
        }
        return self._results(jobs)

    @staticmethod
    def _timed(jobs: Mapping[tuple[str, int], Future[dict[str, float]]], seed: int) -> bool:
        return all(jobs[arm, seed].done() for arm in ("grpo", "roma"))

    @staticmethod
    def _equal_steps(
        jobs: Mapping[tuple[str, int], Future[dict[str, float]]], seed: int, steps: int
    ) -> int:
        took = {arm: jobs[arm, seed].result()["train_cpu_s"] for arm in ("grpo", "roma")}
        ratio = took["roma"] / took["grpo"]
        return max(math.ceil(steps * ratio), steps)

    def _results(self, jobs: Mapping[tuple[str, int], Any]) -> dict[str, dict[int, Any]]:
        from roma.evaluate.result import EvalResult

        results: dict[str, dict[int, Any]] = {arm: {} for arm in ("base", *ARMS)}
        for arm, seed in jobs:
            results[arm][seed] = EvalResult.load(_answers(self.out, arm, seed))
        return results

    def _drain(
        self,
        events: "Queue[tuple[str, int, int]]",
        bars: Progress,
        tasks: Mapping[tuple[str, int], TaskID],
    ) -> None:
        deadline = time.monotonic() + 0.3
        while (left := deadline - time.monotonic()) > 0:
            try:
                arm, seed, step = events.get(timeout=left)
            except Empty:
                return
            task = tasks[arm, seed]
            if step == _DONE:
                if not self.console.is_terminal:  # a log file shows no bars
                    self.console.print(f"{arm} seed {seed}: trained and evaluated")
                bars.update(task, completed=bars.tasks[task].total, description=f"{arm} {seed} ✓")
            else:
                bars.update(task, completed=step)

    def _report(self, results: dict[str, dict[int, Any]], images: Any) -> Path:
        from experiments.report.report import (
            build_report,
            choose_gallery,
            print_report,
            read_metrics,
            write_report,
        )
        from roma.info import info

        arms = {arm: to_dict(self._config(arm, self.seeds[0])) for arm in ARMS}
        levels = (self.configs / "demo_levels.yaml").read_text(encoding="utf-8")
        report = build_report(
            results,
            config={"sizes": vars(self.sizes), "arms": arms, "levels": levels},
            versions={p["name"]: p["version"] for p in info()["packages"] if p["version"]},
            timings=self.timings,
            tuned_on="validation split (levels, λ); steps: settled with test figures known",
        )
        page = write_report(
            self.out,
            report,
            metrics=read_metrics(self.out),
            gallery=choose_gallery(results, images),
        )
        print_report(report, self.console)
        self.console.print(f"report: {page}", soft_wrap=True)
        return page

    def _bars(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        )
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)


def _one_thread() -> None:
    """Set before a worker imports torch and DALI: concurrent runs have one core each."""
    os.environ["OMP_NUM_THREADS"] = os.environ["DALI_NUM_THREADS"] = "1"


def _answers(out: Path, arm: str, seed: int) -> Path:
    return (
        out / "base" / "answers.json"
        if arm == "base"
        else out / f"{arm}-seed{seed}" / "answers.json"
    )


def _job(
    out: Path, arm: str, seed: int, config: Config | None, events: "Queue[tuple[str, int, int]]"
) -> dict[str, float]:
    """Trains one arm (the base model is not trained) and evaluates it, in its own process."""
    import torch

    from roma.evaluate.run import evaluate, policy_answerer
    from roma.models.qwen_vl import Policy
    from roma.train.trainer import train

    torch.set_num_threads(1)
    path, start, cpu_start = out / "base", time.perf_counter(), time.process_time()
    if config is not None:
        path = train(config, progress=lambda step, _: events.put((arm, seed, step))) / "actor"
    trained, cpu_s = time.perf_counter(), time.process_time() - cpu_start
    images = pickle.loads((out / "test_images.pickle").read_bytes())
    policy = Policy.load(path)
    result = evaluate(policy_answerer(policy, max_new_tokens=16), images, batch_size=500)
    result.save(_answers(out, arm, seed))
    events.put((arm, seed, _DONE))
    return {
        "steps": 0 if config is None else config.trainer.total_steps,
        "train_s": round(trained - start, 1),
        "train_cpu_s": round(cpu_s, 1),
        "evaluate_s": round(time.perf_counter() - trained, 1),
    }
