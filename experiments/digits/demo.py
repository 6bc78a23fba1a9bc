"""The demo on digits: data, warm start, five arms over several seeds, methods, a report.

All arms start from one warm-started model and differ in one setting: `grpo` has clean rollouts and
no views, `naive` is GRPO with rollouts on a degraded image, `naive_mild` the same with milder
degradations, `roma` adds the views to the loss, and `grpo_equal_time` is GRPO with more steps, by
the ratio of the CPU times that ROMA and GRPO took for that seed (one thread each). All arms are
evaluated on the same degraded test images; their scans were used neither for training nor for
tuning. The highest level of the evaluation lies beyond what training views reach, the one before it
inside.

With methods (experiments/digits/arms.py) their arms come beside the five, of as many steps and as
many rollouts a step. The five arms, data and warm start of an earlier demo in the folder are taken
as they are, if their settings are the same.
"""

import json
import math
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.digits.arms import ARMS, METHODS, methods_of
from experiments.runner.ground import make_base, make_images, run_config
from experiments.runner.jobs import Arm, Job, Runs, by_run
from roma.train.config import Config, to_dict
from roma_kernels.errors import fail

POOLS = ("clean", "seen", "unseen")
LEVELS = (1, 2, 3, 4)


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
    """RL steps of an arm; None: those of its file in configs/."""


def run_demo(
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sizes | None = None,
    methods: Sequence[str] = (),
) -> Path:
    """Runs the demo and returns the path of its report.html.

    Writes to `out`: report.json, report.html, plots (PNG), data/, base/, and per arm and seed a run
    folder with metrics.jsonl, config.yaml and the last checkpoint. Without methods the files of an
    earlier demo there are replaced; with them, finished runs of the same settings are kept.

    Args:
        out: the run folder.
        seeds: of the RL runs, at least one.
        sizes: None for the defaults.
        methods: names in `experiments.digits.arms.METHODS`.

    Raises:
        ValueError: no seeds, a seed twice, an unknown method or one twice, or no configs/ (run it
            in a clone).
    """
    if not seeds or len(set(seeds)) < len(seeds):
        fail("seeds", "distinct numbers, at least one", str(list(seeds)), "0,1,2 are customary")
    configs = Path(__file__).resolve().parents[2] / "configs"
    if not (configs / "demo.yaml").is_file():
        fail("configs", "configs/demo.yaml in the clone", "none", "run the demo in a clone")
    arms = ARMS | {name: METHODS[name] for name in methods_of(methods)}
    return _Demo(Path(out), configs, list(seeds), sizes or Sizes(), arms).run()


class _Demo:
    def __init__(
        self, out: Path, configs: Path, seeds: list[int], sizes: Sizes, arms: Mapping[str, Arm]
    ) -> None:
        self.out, self.configs, self.seeds, self.sizes, self.arms = out, configs, seeds, sizes, arms
        self.console = Console()
        self.timings: dict[str, Any] = {}
        self.levels = (configs / "demo_levels.yaml").read_text(encoding="utf-8")
        self.images = out / "test_images.pickle"

    @property
    def methods(self) -> list[str]:
        return [arm for arm in self.arms if arm not in ARMS]

    def run(self) -> Path:
        """All stages, one after another."""
        self.out.mkdir(parents=True, exist_ok=True)
        kept = bool(self.methods) and self._made_earlier()
        if kept:
            self.console.print(f"data, warm start and test images: taken from {self.out}")
        else:
            self._make()
        arms = f"{len(self.arms)} arms × {len(self.seeds)} seeds"
        with self._stage("train_and_evaluate", arms):
            results = self._train_and_evaluate(reuse=kept)
        with self._stage("report", "tables, plots, report.html"):
            return self._report(results, pickle.loads(self.images.read_bytes()))

    @contextmanager
    def _stage(self, name: str, what: str) -> Iterator[None]:
        self.console.print(f"[bold]{name.replace('_', ' ')}[/]: {what}")
        start = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - start, 1)

    def _config(self, arm: str, seed: int, steps: int | None = None) -> Config:
        return run_config(
            self.arms[arm],
            configs=self.configs,
            ground=self.out,
            level_table="demo_levels.yaml",
            out=self.out / f"{arm}-seed{seed}",
            seed=seed,
            steps=steps or self.sizes.steps,
        )

    def _job(self, arm: str, seed: int, steps: int | None = None) -> Job:
        if arm == "base":
            return Job(arm=arm, seed=seed, folder=self.out / "base", images=self.images)
        config = self._config(arm, seed, steps)
        folder = Path(config.trainer.out)
        return Job(arm=arm, seed=seed, folder=folder, images=self.images, config=config)

    def _made_earlier(self) -> bool:
        """Whether the folder holds data, warm start and images of these sizes and levels."""
        path = self.out / "made.json"
        if not path.is_file():
            return False
        made = json.loads(path.read_text(encoding="utf-8"))
        self.timings |= made.pop("timings")
        return bool(made == self._wanted())

    def _wanted(self) -> dict[str, Any]:
        return {
            "sizes": asdict(self.sizes),
            "levels": self.levels,
            "measured": [*POOLS, *LEVELS],
        }

    def _make(self) -> None:
        """Data, warm start and test images, in place of what an earlier demo left."""
        (self.out / "made.json").unlink(missing_ok=True)
        for stale in (*self.out.glob("*-seed*"), self.out / "base"):
            shutil.rmtree(stale, ignore_errors=True)
        with self._stage("data", "questions about two handwritten digits"):
            self._make_data()
        with self._stage("warm_start", "a small Qwen3-VL, supervised, clean images"):
            self._warm_start()
        with self._stage("degraded_images", f"the test images, clean and at levels {LEVELS}"):
            self._degrade()
        made = self._wanted() | {"timings": self.timings}
        (self.out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def _make_data(self) -> None:
        from roma.data import write_digits

        sizes, folder = self.sizes, self.out / "data"
        write_digits(folder, train=sizes.train, val=sizes.val, test=sizes.test, overwrite=True)

    def _warm_start(self) -> None:
        from roma.data import DIGIT_WORDS

        steps = self.sizes.warm_steps
        make_base(self.out, words=DIGIT_WORDS, steps=steps, console=self.console)

    def _degrade(self) -> None:
        from roma.data import load_dataset_rows
        from roma.evaluate.conditions import cells_of
        from roma.views import load_levels

        table = load_levels(self.configs / "demo_levels.yaml")
        rows, cells = (
            load_dataset_rows(self.out / "data", split="test"),
            cells_of(POOLS, LEVELS, table),
        )
        make_images(self.images, rows, cells, base=self.out / "base", corruptions=table)

    def _train_and_evaluate(self, *, reuse: bool) -> dict[str, dict[int, Any]]:
        """Jobs on as many processes as cores, one thread each; returns arm → seed → answers."""
        from roma.evaluate.result import EvalResult

        with Runs(self.console, reuse=reuse) as runs:
            # GRPO and ROMA of each seed come first: their times give the steps of equal time.
            runs.start(self._job("base", 0))
            for seed in self.seeds:
                for arm in ("grpo", "roma"):
                    runs.start(self._job(arm, seed))
            waiting = list(self.seeds)
            while waiting:
                runs.busy()
                for seed in [s for s in waiting if runs.done("grpo", s) and runs.done("roma", s)]:
                    waiting.remove(seed)
                    more = self._equal_steps(runs, seed)
                    runs.start(self._job("grpo_equal_time", seed, more))
                    for arm in ("naive", "naive_mild", *self.methods):
                        runs.start(self._job(arm, seed))
            took = runs.everything()
        self.timings["runs"] = by_run(took)
        results: dict[str, dict[int, Any]] = {arm: {} for arm in ("base", *self.arms)}
        for arm, seed in took:
            results[arm][seed] = EvalResult.load(self._job(arm, seed).answers)
        return results

    def _equal_steps(self, runs: Runs, seed: int) -> int:
        steps = self._config("grpo", seed).trainer.total_steps
        took = {arm: runs.took(arm, seed)["train_cpu_s"] for arm in ("grpo", "roma")}
        return max(math.ceil(steps * took["roma"] / took["grpo"]), steps)

    def _report(self, results: dict[str, dict[int, Any]], images: Any) -> Path:
        from experiments.report.report import (
            build_report,
            choose_gallery,
            read_metrics,
            write_report,
        )
        from experiments.report.terminal import print_report
        from roma.info import info

        arms = {arm: to_dict(self._config(arm, self.seeds[0])) for arm in self.arms}
        report = build_report(
            results,
            config={"sizes": vars(self.sizes), "arms": arms, "levels": self.levels},
            versions={p["name"]: p["version"] for p in info()["packages"] if p["version"]},
            timings=self.timings,
            tuned_on="validation split (levels, severity of views, λ); steps: settled with test"
            " figures known",
            trained_to=arms["roma"]["algorithm"]["views"]["max_level"],
        )
        page = write_report(
            self.out,
            report,
            metrics=read_metrics(self.out, arms=list(self.arms)),
            gallery=choose_gallery(results, images),
        )
        print_report(report, self.console)
        self.console.print(f"report: {page}", soft_wrap=True)
        return page
