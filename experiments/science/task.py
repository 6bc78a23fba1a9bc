"""A task that small policies learn on a CPU: its questions, warm start, images and folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.runner.ground import make_base, make_images, run_config
from experiments.runner.jobs import Arm
from experiments.science.bars import BAR_WORDS, bar_questions
from roma.data import DIGIT_WORDS, Example, load_dataset_rows
from roma.data.synthetic.digits import digit_questions
from roma.data.synthetic.writer import Source, write_splits
from roma.evaluate.conditions import Cell, cells_of
from roma.train.config import Config
from roma.views import Corruption, load_levels
from roma_kernels.errors import fail

CONFIGS = Path("configs")
"""Relative, as all paths of a run are: a run made in one clone is known again in another."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked, and how the policy is made that RL starts from."""

    name: str
    questions: Source
    words: Sequence[str]
    """Every word of problems and solutions."""
    config: str
    """Of ROMA's run, in configs/."""
    level_table: str
    """In configs/."""
    warm_steps: int
    """Supervised steps of 32 questions each."""
    warm_threads: int
    """Of torch in the warm start; another number gives another model in the last bits."""
    answer_tokens: int
    """Budget of an answer in an evaluation, tokens."""
    sizes: Mapping[str, int] = field(
        default_factory=lambda: {"train": 8000, "val": 1000, "test": 1000}
    )
    measured: int = 500
    """Questions of a split that a model is measured on, the first ones."""
    levels: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"val": (2, 3, 4), "test": (3, 4)}
    )
    """Split → levels of pools seen and unseen that are measured. Views of the chosen severity reach
    the last but one in training, and not the last."""
    unreadable: int = 5
    """At it nothing can be read, but for JPEG, whose quality ends at 1. Test images have it too, of
    pool seen."""


DIGITS = Task(
    name="digits",
    questions=digit_questions,
    words=DIGIT_WORDS,
    config="demo.yaml",
    level_table="demo_levels.yaml",
    warm_steps=300,
    warm_threads=1,
    answer_tokens=16,
)
BARS = Task(
    name="bars",
    questions=bar_questions,
    words=BAR_WORDS,
    config="bars.yaml",
    level_table="bars_levels.yaml",
    warm_steps=700,
    warm_threads=2,
    answer_tokens=32,
)


class Place:
    """A task in a folder.

    Args:
        task: what is asked.
        out: the folder of all tasks.
        console: for progress.
    """

    def __init__(self, task: Task, out: Path, console: Console) -> None:
        """Makes the folder, and nothing in it."""
        self.task, self.folder, self.console = task, out / task.name, console
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def base(self) -> Path:
        """The warm-started model."""
        return self.folder / "base"

    @cached_property
    def corruptions(self) -> Mapping[str, Corruption]:
        """The level table."""
        return load_levels(CONFIGS / self.task.level_table)

    def prepare(self) -> None:
        """Writes the data and the warm-started model, where they are not there yet.

        Raises:
            ValueError: the folder holds those of other settings.
        """
        task, path = self.task, self.folder / "made.json"  # written last
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != self.settings():
                remedy = "remove the folder, or name another: --out"
                fail(str(self.folder), "runs of these settings", "those of others", remedy)
            return
        write_splits(
            self.folder / "data",
            task.questions,
            sizes=dict(task.sizes),
            seed=0,
            format="parquet",
            overwrite=True,
        )
        make_base(
            self.folder,
            words=task.words,
            steps=task.warm_steps,
            console=self.console,
            threads=task.warm_threads,
        )
        path.write_text(json.dumps(self.settings(), indent=1) + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What data, warm start and images depend on; JSON-able."""
        task = self.task
        return {
            "sizes": dict(task.sizes),
            "measured": task.measured,
            "levels": {split: list(levels) for split, levels in task.levels.items()},
            "unreadable": task.unreadable,
            "level_table": (CONFIGS / task.level_table).read_text(encoding="utf-8"),
            "warm_start": [task.warm_steps, task.warm_threads],
        }

    def examples(self, split: str) -> list[Example]:
        """The questions of a split that models are measured on."""
        rows = load_dataset_rows(self.folder / "data", split=split)
        return [rows[i] for i in range(self.task.measured)]

    def images(self, split: str) -> Path:
        """A pickle of `DegradedImages`: what `cells` says."""
        path = self.folder / f"{split}_images.pickle"
        if not path.is_file():
            examples, cells = self.examples(split), self.cells(split)
            make_images(path, examples, cells, base=self.base, corruptions=self.corruptions)
        return path

    def cells(self, split: str) -> list[Cell]:
        """Every condition that a model is measured at."""
        task, table = self.task, self.corruptions
        readable = cells_of(("clean", "seen", "unseen"), task.levels[split], table)
        if split == "val":
            return readable
        return readable + cells_of(("seen",), (task.unreadable,), table)

    def config(self, name: str, arm: Arm, seed: int, *, steps: int | None = None) -> Config:
        """The run of an arm; `steps` in place of its file's."""
        return run_config(
            arm,
            configs=CONFIGS,
            ground=self.folder,
            level_table=self.task.level_table,
            out=self.folder / f"{name}-seed{seed}",
            seed=seed,
            steps=steps,
        )
