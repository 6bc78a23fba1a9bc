"""A task that small policies learn on a CPU: its questions, warm start, images and folder."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rich.console import Console

from experiments.runner.jobs import Arm, bars
from experiments.runner.warm_start import warm_start
from experiments.science.bars import BAR_WORDS, bar_questions
from roma.data import DIGIT_WORDS, Example, load_dataset_rows
from roma.data.synthetic.digits import digit_questions
from roma.data.synthetic.writer import Source, write_splits
from roma.evaluate.conditions import Cell, DegradedImages, cells_of
from roma.train.config import Config, load_config
from roma.views import Corruption, load_levels

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
    answer_tokens=16,
)
BARS = Task(
    name="bars",
    questions=bar_questions,
    words=BAR_WORDS,
    config="bars.yaml",
    level_table="bars_levels.yaml",
    warm_steps=700,
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
        """Writes the data and the warm-started model, where they are not there yet."""
        from roma.models.qwen_vl import Policy
        from roma.models.small import build_small_vlm

        done = self.base / "made"  # written last
        if done.is_file():
            return
        task = self.task
        data = self.folder / "data"
        sizes = dict(task.sizes)
        write_splits(data, task.questions, sizes=sizes, seed=0, format="parquet", overwrite=True)
        policy = Policy.load(build_small_vlm(self.base, words=task.words))
        with bars(self.console) as shown:
            bar = shown.add_task(f"{task.name}: warm start", total=task.warm_steps)
            warm_start(
                policy,
                load_dataset_rows(data, split="train"),
                steps=task.warm_steps,
                batch_size=32,
                progress=lambda step, _: shown.update(bar, completed=step),
            )
        policy.save_pretrained(self.base)
        done.touch()

    def examples(self, split: str) -> list[Example]:
        """The questions of a split that models are measured on."""
        rows = load_dataset_rows(self.folder / "data", split=split)
        return [rows[i] for i in range(self.task.measured)]

    def images(self, split: str) -> Path:
        """A pickle of `DegradedImages`: what `cells` says."""
        path = self.folder / f"{split}_images.pickle"
        if not path.is_file():
            from roma.models.qwen_vl import Policy

            images = DegradedImages(
                self.examples(split),
                self.cells(split),
                resize=Policy.load(self.base).processor.resize,
                corruptions=self.corruptions,
            )
            part = path.with_suffix(".part")
            part.write_bytes(pickle.dumps(images.make_all()))
            part.rename(path)
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
        return load_config(
            CONFIGS / arm.file,
            [
                f"data.train_files={self.folder}/data@train",
                f"data.val_files={self.folder}/data@val",
                f"algorithm.views.level_table={CONFIGS / self.task.level_table}",
                f"worker.actor.model_path={self.base}",
                f"trainer.out={self.folder}/{name}-seed{seed}",
                f"trainer.seed={seed}",
                f"data.seed={seed}",
                "trainer.resume=never",
                "trainer.logger=[file]",
                *arm.overrides,
                *([f"trainer.total_steps={steps}"] if steps else []),
            ],
        )
