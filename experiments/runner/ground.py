"""What all runs of an experiment start from: a folder with data/, base/ and degraded images."""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from experiments.runner.jobs import Arm, bars
from roma.data import Example, load_dataset_rows
from roma.evaluate.conditions import Cell, DegradedImages
from roma.train.config import Config, load_config
from roma.views import Corruption


def run_config(
    arm: Arm,
    *,
    configs: Path,
    ground: Path,
    level_table: str,
    out: Path,
    seed: int,
    steps: int | None = None,
) -> Config:
    """The run of an arm.

    Args:
        arm: its file in configs/, and overrides; one of them may name another level table.
        configs: the folder configs/.
        ground: the folder with data/ and base/.
        level_table: a file in configs/.
        out: the run's own folder.
        seed: of the run and of the order of its questions.
        steps: in place of the file's.
    """
    table = f"algorithm.views.level_table={configs}/{level_table}"
    own = any("level_table" in override for override in arm.overrides)
    overrides = [
        f"data.train_files={ground}/data@train",
        f"data.val_files={ground}/data@val",
        *(() if own else (table,)),
        f"worker.actor.model_path={ground}/base",
        f"trainer.out={out}",
        f"trainer.seed={seed}",
        f"data.seed={seed}",
        "trainer.resume=never",
        "trainer.logger=[file]",
        *arm.overrides,
        *([f"trainer.total_steps={steps}"] if steps else []),
    ]
    return load_config(configs / arm.file, overrides)


def make_base(
    ground: Path, *, words: Sequence[str], steps: int, console: Console, threads: int = 2
) -> None:
    """Warm-starts a small Qwen3-VL on the solutions of data@train and writes it to base/.

    Args:
        ground: the folder with data/.
        words: every word of problems and solutions.
        steps: of 32 questions each.
        console: for progress.
        threads: of torch. They order its sums: another number gives other last bits, and runs that
            start from them part.
    """
    from experiments.runner.warm_start import warm_start
    from roma.models.qwen_vl import Policy
    from roma.models.small import build_small_vlm

    policy = Policy.load(build_small_vlm(ground / "base", words=words))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with bars(console) as shown:
            task = shown.add_task("warm start", total=steps)
            warm_start(
                policy,
                load_dataset_rows(ground / "data", split="train"),
                steps=steps,
                batch_size=32,
                progress=lambda step, _: shown.update(task, completed=step),
            )
    finally:
        torch.set_num_threads(before)
    policy.save_pretrained(ground / "base")


def make_images(
    path: Path,
    examples: Iterable[Example],
    cells: Sequence[Cell],
    *,
    base: Path,
    corruptions: Mapping[str, Corruption],
) -> None:
    """Writes a pickle of `DegradedImages`, all made; it appears when it is whole."""
    from roma.models.qwen_vl import Policy

    resize = Policy.load(base).processor.resize
    images = DegradedImages(examples, cells, resize=resize, corruptions=corruptions)
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(images.make_all()))
    part.rename(path)
