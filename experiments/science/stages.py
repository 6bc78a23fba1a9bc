"""The stages of `make science`: each does what is not done yet, and writes its tables."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import coverage
from experiments.report.hierarchy import Hierarchy
from experiments.report.rows import FIELDS
from experiments.science import perception
from experiments.science.plan import METHODS, SEVERITIES, STUDIES, at
from experiments.science.results import FOLDER, over_seeds, write
from experiments.science.study import StudyRun
from experiments.science.task import Place
from roma.data import Example, load_dataset_rows
from roma.evaluate.conditions import Cell
from roma.evaluate.result import EvalResult
from roma_kernels.errors import fail


@dataclass(frozen=True)
class Stage:
    """A part of the work, and what it is in a few words."""

    run: Callable[[Path, Console], None]
    what: str


def run_stages(names: Sequence[str], out: Path, console: Console) -> None:
    """Runs some stages, or all, in their order.

    Raises:
        ValueError: no such stage, or no configs/ (run it in a clone).
    """
    for name in names:
        if name not in STAGES:
            fail("stage", f"some of {', '.join(STAGES)}", repr(name), "correct it")
    if not Path("configs/demo.yaml").is_file():
        fail("configs", "configs/demo.yaml here", "none", "run it in the root of a clone")
    for name, stage in STAGES.items():
        if name in names or not names:
            console.print(f"[bold]{name}[/]: {stage.what}")
            stage.run(out, console)


def _study(name: str) -> Callable[[Path, Console], None]:
    def run(out: Path, console: Console) -> None:
        study = STUDIES[name]
        place = Place(study.task, out, console)
        place.prepare()
        made = StudyRun(study, place)
        made.train()
        console.print(f"wrote {made.write('val')}", soft_wrap=True)
        made.test()
        console.print(f"wrote {made.write('test')}", soft_wrap=True)

    return run


def _perception(out: Path, console: Console) -> None:
    """What chains claim to see: sampled in training, and on test images."""
    study = STUDIES["severity"]
    made = StudyRun(study, Place(study.task, out, console))
    rows = [*_poisoned(made), *_readings(made)]
    console.print(f"wrote {write('perception', rows)}", soft_wrap=True)


def _poisoned(made: StudyRun) -> list[dict[str, Any]]:
    """Rewarded rollouts that name what is not there: of the warm start and of trained policies."""
    place, rows = made.place, list[dict[str, Any]]()
    data = load_dataset_rows(place.folder / "data", split="train")
    examples = [data[i] for i in range(perception.QUESTIONS)]
    views: list[float | None] = [None, *SEVERITIES]
    wanted = [("base", severity) for severity in views]
    wanted += [("grpo", severity) for severity in views]
    wanted += [(at(name, own), own) for name in ("naive", "roma") for own in SEVERITIES]
    wanted += [(at("roma", own), None) for own in SEVERITIES]
    for arm, severity in wanted:
        found: dict[str, dict[int, float]] = {}
        for seed in (0,) if arm == "base" else made.study.seeds:
            shares = _sampled(made, arm, seed, severity, examples)
            for name, share in shares.items():
                found.setdefault(name, {})[seed] = share
        where = "clean" if severity is None else f"views to {severity:g}"
        for name, by_seed in found.items():
            rows += over_seeds("rollouts", arm, f"{name}, {where}", by_seed)
    return rows


def _sampled(
    made: StudyRun, arm: str, seed: int, severity: float | None, examples: Sequence[Example]
) -> dict[str, float]:
    """`perception.rollouts_at`, kept beside the model's answers."""
    place = made.place
    where = "clean" if severity is None else f"{severity:g}"
    path = place.folder / "rollouts" / f"{arm}-seed{seed}-{where}.json"
    if not path.is_file():
        shares = perception.rollouts_at(
            made.model(arm, seed),
            examples,
            severity,
            place.corruptions,
            answer_tokens=place.task.answer_tokens,
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(shares) + "\n", encoding="utf-8")
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _readings(made: StudyRun) -> list[dict[str, Any]]:
    """What greedy answers on test images claim to see, with intervals over seeds and images."""
    place, rows = made.place, list[dict[str, Any]]()
    task, examples = place.task, place.examples("test")
    cells = {"clean": [Cell()]}
    for level in (*task.levels["test"], task.unreadable):
        seen = [c for c in place.cells("test") if (c.pool, c.level) == ("seen", level)]
        # Of the lowest quality a JPEG is still legible.
        cells[f"seen L{level}"] = [
            c for c in seen if level < task.unreadable or c.corruption != "jpeg"
        ]
    draws = Hierarchy(len(examples))
    for arm in ("base", "grpo", *(at(name, own) for name in METHODS for own in SEVERITIES)):
        seeds = (0,) if arm == "base" else made.study.seeds
        results = [EvalResult.load(made.measured(arm, seed, "test").answers) for seed in seeds]
        for where, group in cells.items():
            read = [
                [perception.readings(result.cells[cell], examples) for cell in group]
                for result in results
            ]
            for measure in ("misread", "unfaithful", "stock"):
                scores = np.array(
                    [np.mean([getattr(own, measure) for own in each], axis=0) for each in read]
                )
                entry = draws.intervals(scores[:, None])[0].as_dict()
                ends = [entry[end] for end in ("mean", "low", "high")]
                first = ("reading", arm, "", "mean", f"{measure}, {where}")
                rows.append(dict(zip(FIELDS, (*first, *ends), strict=True)))
    return rows


def _coverage(out: Path, console: Console) -> None:
    """How often intervals over seeds and images hold, by simulation."""
    rows = []
    for count, spread in product(coverage.SEEDS, coverage.SPREADS):
        where = f"{count} seeds, spread {100 * spread:g}"
        for kind, share in coverage.over_seeds(count, spread).items():
            values = (kind, "", "", "mean", where, *[round(100 * share, 3)] * 3)
            rows.append(dict(zip(FIELDS, values, strict=True)))
    console.print(f"wrote {write('coverage', rows)}", soft_wrap=True)


def _demo(out: Path, console: Console) -> None:
    """Takes the figures of a demo that was run."""
    demo = Path("runs/demo")
    if not (demo / "report.csv").is_file():
        console.print(f"{demo} holds no report.csv: run make demo; the committed figures stay")
        return
    shutil.copyfile(demo / "report.csv", FOLDER / "demo.csv")
    shutil.copyfile(demo / "robustness.png", "docs/demo_robustness.png")
    console.print(f"wrote {FOLDER / 'demo.csv'}", soft_wrap=True)


def _pages(out: Path, console: Console) -> None:
    """Figures and documents, all from the CSV files."""
    from experiments.science.pages import write_figures, write_pages

    for path in (*write_figures(), *write_pages()):
        console.print(f"wrote {path}", soft_wrap=True)


STAGES = {
    "severity": Stage(_study("severity"), "methods over the severity of training views"),
    "time": Stage(_study("time"), "GRPO and naive augmentation with ROMA's CPU time"),
    "poison": Stage(_study("poison"), "naive augmentation with a reward that checks what is seen"),
    "bars": Stage(_study("bars"), "the second task: four marks of a chart, K = 4"),
    "ablations": Stage(_study("ablations"), "ROMA without each of its parts"),
    "perception": Stage(_perception, "what chains claim to see"),
    "coverage": Stage(_coverage, "how often the intervals hold"),
    "demo": Stage(_demo, "the figures of make demo"),
    "pages": Stage(_pages, "figures and documents from the CSV files"),
}
