"""`python -m experiments.digits.study NAME`: what docs/METHODS.md shows of an option, on the demo.

A study is a set of arms, all from the warm start of a demo and with its steps, which `make demo`
must have made. Views go up to level 2, the demo's former setting, with which the published figures
were made; an arm that is the demo's own is taken from it. They are compared on validation questions
while settings are looked for, and once on the test questions. Runs that are finished are not run
again.

    attack    views against the policy in training, measured clean, degraded and under attack
    gate      views on which digits are erased, with and without a legibility gate
    control   a λ that moves towards a target
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.digits.arms import ARMS, MILD
from experiments.runner.ground import make_images, run_config
from experiments.runner.jobs import Arm, Job, Runs, by_run
from roma.train.config import Config
from roma_kernels.errors import fail

LEVEL = 3
"""Of the degradations that a study measures."""
VALIDATION = 500
"""Validation questions that it measures on."""
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Study:
    """Arms, and those that the others are compared with."""

    arms: Mapping[str, Arm]
    against: tuple[str, ...]
    attacks: tuple[int, ...] = ()
    """Levels of pool "adversarial" at which they are measured too."""


def _roma(*overrides: str, views: str = MILD) -> Arm:
    return Arm(("algorithm.view_mode=roma", views, *(f"algorithm.{o}" for o in overrides)))


_ERASED = f"views.level_table={CONFIGS}/demo_levels_erasing.yaml"
STUDIES = {
    "attack": Study(
        {
            "grpo": ARMS["grpo"],
            "roma": _roma(),
            "pgd": _roma("views.pool=adversarial", views="algorithm.views.max_level=3"),
            "seen_pgd": _roma(
                "views.attack.count=1", f"views.level_table={CONFIGS}/demo_levels_attack.yaml"
            ),
        },
        against=("grpo", "roma"),
        attacks=(2, 3, 4),
    ),
    "gate": Study(
        {
            "grpo": ARMS["grpo"],
            "roma": _roma(),
            "erased": _roma(_ERASED),
            "erased_quantile90": _roma(_ERASED, "views.gate_quantile=0.9"),
            "erased_quantile50": _roma(_ERASED, "views.gate_quantile=0.5"),
            "erased_bound": _roma(_ERASED, "roma.gate_bound=0.3"),
            "erased_tau": _roma(_ERASED, "roma.gate_tau=0.3"),
        },
        against=("roma", "erased"),
    ),
    "control": Study(
        {
            "roma": _roma(),
            "control_penalty": _roma("control.target=penalty", "control.value=0.01"),
            "control_share": _roma(
                "control.target=gradient_share", "control.value=0.3", "control.every=5"
            ),
        },
        against=("roma",),
    ),
}


class _Run:
    """A study in a demo's folder."""

    def __init__(self, name: str, out: Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
        self.study, self.out, self.seeds = STUDIES[name], out, seeds
        self.folder, self.console = out / "study", Console()
        self.arms = {arm: self.study.arms[arm] for arm in arms or self.study.arms}
        self.name = name
        if not (out / "made.json").is_file():
            fail("out", "the folder of a demo", str(out), "run make demo first")

    def config(self, arm: str, seed: int) -> Config:
        """As the demo's, in a folder of its own; of an arm that the demo has, the demo's."""
        place = self.out if self._of_demo(arm) else self.folder
        return run_config(
            self.arms[arm],
            configs=CONFIGS,
            ground=self.out,
            level_table="demo_levels.yaml",
            out=place / f"{arm}-seed{seed}",
            seed=seed,
        )

    def _of_demo(self, arm: str) -> bool:
        return self.arms[arm] == ARMS.get(arm)

    def run(self, split: str) -> dict[str, Any]:
        """Trains what is not yet trained, measures, and returns the report."""
        self.folder.mkdir(exist_ok=True)
        runs_of = [(arm, seed) for seed in self.seeds for arm in self.arms]
        with Runs(self.console, reuse=True) as runs:
            for arm, seed in runs_of:
                if not self._of_demo(arm):
                    runs.start(self._trained(arm, seed))
            took = runs.everything()
        with Runs(self.console, reuse=True) as runs:
            for arm, seed in runs_of:
                job = self._measured(arm, seed, split)
                if job.config is None:
                    runs.start(job)
            runs.everything()
        for arm, seed in runs_of:
            if self._of_demo(arm):
                written = self.out / f"{arm}-seed{seed}" / "took.json"
                took[arm, seed] = json.loads(written.read_text(encoding="utf-8"))
        return self._report(split, by_run(took))

    def _trained(self, arm: str, seed: int) -> Job:
        """Trains an arm and measures it on validation questions, without attacks.

        Two studies that have an arm in common share its run.
        """
        config = self.config(arm, seed)
        folder = Path(config.trainer.out)
        return Job(arm=arm, seed=seed, folder=folder, images=self._images("val"), config=config)

    def _measured(self, arm: str, seed: int, split: str) -> Job:
        """Measures what is trained; the training run itself where that has measured it."""
        if split == "val" and not (self.study.attacks or self._of_demo(arm)):
            return self._trained(arm, seed)
        config = self.config(arm, seed)
        own, attacked = Path(config.trainer.out), "-attacked" if self.study.attacks else ""
        return Job(
            arm=arm,
            seed=seed,
            folder=self.folder / f"{split}{attacked}" / own.name,
            images=self._images(split),
            model=own / f"global_step_{config.trainer.total_steps}" / "actor",
            attacks=self.study.attacks,
        )

    def _images(self, split: str) -> Path:
        """Clean, seen and unseen images of a split at one level, made once."""
        from roma.data import load_dataset_rows
        from roma.evaluate.conditions import cells_of
        from roma.views import load_levels

        path = self.folder / f"{split}_images.pickle"
        if not path.is_file():
            table = load_levels(CONFIGS / "demo_levels.yaml")
            rows = load_dataset_rows(self.out / "data", split=split)
            some = [rows[i] for i in range(min(len(rows), VALIDATION))]
            cells = cells_of(("clean", "seen", "unseen"), (LEVEL,), table)
            make_images(path, some, cells, base=self.out / "base", corruptions=table)
        return path

    def _report(self, split: str, took: Mapping[str, Any]) -> dict[str, Any]:
        from experiments.report.report import build_report
        from roma.evaluate.result import EvalResult

        results = {
            arm: {seed: EvalResult.load(self._measured(arm, seed, split).answers)
                  for seed in self.seeds}
            for arm in self.arms
        }  # fmt: skip
        pairs = [
            (arm, other)
            for other in self.study.against
            if other in self.arms
            for arm in list(self.arms)[list(self.arms).index(other) + 1 :]
        ]
        return build_report(
            results,
            config={arm: list(self.arms[arm].overrides) for arm in self.arms},
            versions={},
            timings={"runs": took},
            tuned_on=f"validation split; measured on {split}",
            comparisons=pairs,
        )


def run_study(
    name: str,
    out: str | Path = "runs/demo",
    *,
    split: str = "val",
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs a study, writes `study/NAME-SPLIT.json` in the demo's folder, and returns the report.

    Args:
        name: in `STUDIES`.
        out: a demo's folder.
        split: "val" or "test".
        seeds: of the runs; of the demo's own arms those must be there.
        arms: some of the study's; none: all.

    Raises:
        ValueError: no such study or arm, or no demo in the folder.
    """
    if name not in STUDIES:
        fail("study", f"one of {', '.join(STUDIES)}", repr(name), "name one of them")
    for arm in arms:
        if arm not in STUDIES[name].arms:
            fail("arms", f"some of {', '.join(STUDIES[name].arms)}", repr(arm), "correct it")
    run = _Run(name, Path(out), seeds, arms)
    report = run.run(split)
    path = run.folder / f"{name}-{split}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Entry point."""
    from experiments.report.markdown import tables
    from experiments.report.terminal import print_report

    parser = argparse.ArgumentParser(prog="python -m experiments.digits.study", description=__doc__)
    parser.add_argument("name", choices=list(STUDIES))
    parser.add_argument("--out", default="runs/demo", help="the folder of a demo (runs/demo)")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="questions (val)")
    parser.add_argument("--seeds", default="0", help="run seeds (0)")
    parser.add_argument("--arms", default="", help="some of the study's arms; none: all")
    options = parser.parse_args()
    report = run_study(
        options.name,
        options.out,
        split=options.split,
        seeds=[int(seed) for seed in options.seeds.split(",")],
        arms=options.arms.split(),
    )
    print_report(report)
    print(tables(report))


if __name__ == "__main__":  # the processes import this module again
    main()
