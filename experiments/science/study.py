"""Runs a study: trains its arms, measures them, and keeps what was found as tables."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.report.report import build_report
from experiments.report.rows import rows_of
from experiments.runner.jobs import Job, Runs, by_run
from experiments.science.plan import Study
from experiments.science.results import over_seeds, write
from experiments.science.task import Place
from roma.evaluate.result import EvalResult

_LAST = 0.2  # of the steps, over which a run's training reward is averaged


class StudyRun:
    """A study in the folder of its task.

    Args:
        study: what is run.
        place: its task's folder, prepared.
    """

    def __init__(self, study: Study, place: Place) -> None:
        """Runs nothing yet."""
        self.study, self.place = study, place

    def train(self) -> None:
        """Trains what is not trained, and measures it on validation questions."""
        with Runs(self.place.console, reuse=True) as runs:
            runs.start(self.measured("base", 0, "val"))
            for seed in self.study.seeds:
                for arm in self.study.arms:
                    if arm not in self.study.as_long_as:
                        runs.start(self._trained(arm, seed))
            runs.everything()
            for seed in self.study.seeds:
                for arm in self.study.as_long_as:
                    runs.start(self._trained(arm, seed))
            runs.everything()

    def test(self) -> None:
        """Measures all on test questions."""
        with Runs(self.place.console, reuse=True) as runs:
            runs.start(self.measured("base", 0, "test"))
            for seed in self.study.seeds:
                for arm in self.study.arms:
                    runs.start(self.measured(arm, seed, "test"))
            runs.everything()

    def report(self, split: str) -> dict[str, Any]:
        """Accuracies and paired differences of a split, as report.json has them."""
        results = {"base": {0: self._result("base", 0, split)}}
        for arm in self.study.arms:
            results[arm] = {seed: self._result(arm, seed, split) for seed in self.study.seeds}
        return build_report(
            results,
            config={arm: list(own.overrides) for arm, own in self.study.arms.items()},
            versions={},
            timings={"runs": self._took()},
            tuned_on="validation split",
            comparisons=self.study.pairs,
        )

    def write(self, split: str) -> Path:
        """Writes the split's CSV file: the report's rows, and what the runs logged."""
        rows = rows_of(self.report(split)) + list(self._training())
        return write(f"{self.study.name}-{split}", rows)

    def model(self, arm: str, seed: int) -> Path:
        """A trained model's folder; the warm start's is that of its task."""
        if arm == "base":
            return self.place.base
        config = self._trained(arm, seed).config
        assert config is not None
        return self.folder(arm, seed) / f"global_step_{config.trainer.total_steps}" / "actor"

    def folder(self, arm: str, seed: int) -> Path:
        """Of a run."""
        return self.place.folder / f"{arm}-seed{seed}"

    def _trained(self, arm: str, seed: int) -> Job:
        """Trains, and measures on validation questions."""
        config = self.place.config(arm, self.study.arms[arm], seed, steps=self._steps(arm, seed))
        return Job(
            arm=arm,
            seed=seed,
            folder=self.folder(arm, seed),
            images=self.place.images("val"),
            config=config,
            answer_tokens=self.place.task.answer_tokens,
        )

    def measured(self, arm: str, seed: int, split: str) -> Job:
        """Measures a trained model on a split."""
        return Job(
            arm=arm,
            seed=seed,
            folder=self.place.folder / split / f"{arm}-seed{seed}",
            images=self.place.images(split),
            model=self.model(arm, seed),
            answer_tokens=self.place.task.answer_tokens,
        )

    def _result(self, arm: str, seed: int, split: str) -> EvalResult:
        trained = arm != "base" and split == "val"
        job = self._trained(arm, seed) if trained else self.measured(arm, seed, split)
        return EvalResult.load(job.answers)

    def _steps(self, arm: str, seed: int) -> int | None:
        """Of an arm that is given another's CPU time; None: those of its file."""
        if arm not in self.study.as_long_as:
            return None
        kind, other = self.study.as_long_as[arm]
        own, given = (self._took_of(each, seed) for each in (kind, other))
        ratio = given["train_cpu_s"] / own["train_cpu_s"]
        return max(math.ceil(own["steps"] * ratio), int(own["steps"]))

    def _took_of(self, arm: str, seed: int) -> dict[str, float]:
        text = (self.folder(arm, seed) / "took.json").read_text(encoding="utf-8")
        found: dict[str, float] = json.loads(text)
        return found

    def _took(self) -> dict[str, Any]:
        arms, seeds = self.study.arms, self.study.seeds
        return by_run({(arm, seed): self._took_of(arm, seed) for arm in arms for seed in seeds})

    def _training(self) -> Iterator[dict[str, Any]]:
        """What each arm's runs logged, %: right rollouts over the last steps, and validation."""
        for arm in self.study.arms:
            reward, steps = dict[int, float](), dict[int, dict[int, float]]()
            for seed in self.study.seeds:
                lines = (self.folder(arm, seed) / "metrics.jsonl").read_text(encoding="utf-8")
                rows = [json.loads(line) for line in lines.splitlines()]
                last = rows[-max(1, round(_LAST * len(rows))) :]
                reward[seed] = 100 * sum(row["reward/accuracy"] for row in last) / len(last)
                for row in rows:
                    if "val/accuracy" in row:
                        steps.setdefault(row["step"], {})[seed] = 100 * row["val/accuracy"]
            yield from over_seeds("training", arm, "reward, last fifth", reward)
            for step, by_seed in sorted(steps.items()):
                if len(by_seed) == len(self.study.seeds):  # equal time ends at steps of its own
                    yield from over_seeds("training", arm, f"validation, step {step}", by_seed)
