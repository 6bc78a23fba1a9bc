"""`roma`: train, evaluate, look at degraded images, make data, see what is installed.

Each command imports what it needs when it runs, so that `roma --help` answers at once. An error
that this package words itself, or the system does (no such file, no space), is one line on stderr
and exit status 2; ROMA_DEBUG=1 shows the traceback. Any other is a bug and shows it always.
"""

import argparse
import dis
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from roma.cli import benchmarks, evaluation, reports
from roma.cli.lists import listed

if TYPE_CHECKING:  # importing it takes numpy and torch
    from roma.views import Corruption

_TOP = """\
step by step:
  roma info                                       back ends, GPU, what to install
  roma data charts --out data/charts              questions about images, with answers
  roma views photo.png --out views.png            what the degradations do to an image
  roma train run.yaml                             rollouts, rewards, views, loss, step
  roma eval runs/x/global_step_300/actor data/charts@test
  roma report runs/eval/x-global_step_300-charts-test      tables, figures: a page

`roma COMMAND --help` explains a command, with examples. The demo, all of it in ten minutes on two
CPU cores, runs in a clone: `make demo`.
"""
_TRAIN = """\
examples:
  roma train --list-configs                       example files that are installed, to copy
  roma train run.yaml
  roma train run.yaml trainer.total_steps=50 algorithm.roma.lambda_inv=3
  roma train run.yaml algorithm.view_mode=none    plain GRPO, to compare with
  roma train data.train_files=data/digits@train worker.actor.model_path=model
  roma train run.yaml --dry-run --ranks 8 --tflops 400     memory, FLOP and time; trains nothing

A value is read as YAML: lr=3e-4, betas=[0.9, 0.98], val_files=null. An unknown key is an error.
The run folder (trainer.out) gets config.yaml, metrics.jsonl and global_step_N/. The same command
run again resumes from the newest checkpoint; trainer.resume=never starts anew.
"""
_DRY_RUN = {
    "--ranks": (int, "N", "processes that learn together (WORLD_SIZE, or 1)"),
    "--tflops": (float, "X", "TFLOP/s that a rank's update sustains (measured here)"),
    "--gpu-gib": (float, "X", "memory of a GPU, of which vLLM takes its share (80)"),
    "--prompt-tokens": (int, "N", "tokens of a question, image tokens included (from the data)"),
    "--image-tokens": (int, "N", "image tokens of a question (from the data)"),
    "--response-tokens": (int, "N", "mean length of an answer (half of the longest)"),
    "--right": (float, "X", "share of right answers, 0 to 1 (0.5)"),
}
_VIEWS = """\
examples:
  roma views --list                               every corruption, its pool and levels
  roma views photo.png --out views.png            one row per corruption, one column per level
  roma views a.jpg b.jpg --out views.png          views-a.png and views-b.png
  roma views photo.png --pools extra              shot_noise, defocus_blur, fog and more
  roma views photo.png --window 150               the middle at full resolution, 1000 px wide
"""
_DATA = """\
examples:
  roma data digits --out data/digits              real handwritten digits: sum, larger
  roma data charts --out data/charts --train 5000 --format jsonl

Writes train, val and test with the columns images, problem, answer (and solution, a worked answer
for a supervised start). The three never share a scan or a chart.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 (an error shown in full), 2, 130 or 141.

    Example:
        >>> main(["views", "--nosuch"])  # doctest: +SKIP
    """
    options = parser().parse_args(_in_order(sys.argv[1:] if arguments is None else arguments))
    # Only views, data and evaluation use NumPy, and they say so themselves where it is missing.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    try:
        importlib.import_module("roma.namesake")  # one line if another `roma` is in the way
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        on = "; the same command goes on" if hasattr(options, "goes_on") else ""
        print(f"roma: interrupted{on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `roma views --list | head -1`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 141
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("ROMA_DEBUG") == "1" or not _is_for_the_user(error):
            raise
        remedy = "; pip install 'roma-vlm[train,views]'" if _names_a_module(error) else ""
        said = str(error).removeprefix("roma: ")
        print(f"roma: {said}{remedy}", file=sys.stderr)
        return 2
    return 0


def _in_order(words: Sequence[str]) -> list[str]:
    """With `a.b=c` of `roma train` beside the file: argparse wants them before the options."""
    at = words.index("train") + 2 if "train" in words[:2] else len(words)
    late = [w for w in words[at:] if "=" in w and not w.startswith("-")]
    return [*words[:at], *late, *(w for w in words[at:] if w not in late)]


def parser() -> argparse.ArgumentParser:
    """The command line, all of it."""
    top = argparse.ArgumentParser(
        prog="roma",
        description="Train vision-language models that keep reasoning on bad images.",
        epilog=_TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    top.add_argument("--version", action=_Version, help="print the version and stop")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., None], summary: str, epilog: str) -> Any:
        form = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=form
        )
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "train a policy from a YAML configuration", _TRAIN)
    train.add_argument("config", nargs="*", metavar="CONFIG a.b=c", help="YAML file and overrides")
    shown = train.add_mutually_exclusive_group()
    shown.add_argument("--list-configs", action="store_true", help="print where examples are")
    shown.add_argument("--list-keys", action="store_true", help="print every key and its meaning")
    shown.add_argument("--list-metrics", action="store_true", help="print each metric's formula")
    shown.add_argument("--print-config", action="store_true", help="print what would run, and stop")
    shown.add_argument("--dry-run", action="store_true", help="print what it would take, and stop")
    plan = train.add_argument_group("with --dry-run")
    for name, (kind, metavar, meaning) in _DRY_RUN.items():
        plan.add_argument(name, type=kind, metavar=metavar, help=meaning)

    evaluation.add_commands(command)
    reports.add_commands(command)
    benchmarks.add_commands(command)

    views = command("views", _views, "see what the degradations do to an image", _VIEWS)
    views.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    views.add_argument("--out", default="views.png", help="PNG file to write (views.png)")
    views.add_argument("--list", action="store_true", help="list corruptions, pools and levels")
    views.add_argument(
        "--pools", type=listed(str), default=["seen", "unseen"], help="pools drawn (seen,unseen)"
    )
    views.add_argument("--window", type=int, help="show the middle, WINDOW px wide and high")
    views.add_argument("--level-table", help="YAML with other levels, for small images")
    views.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")

    data = command("data", _data, "make a dataset whose answers can be verified", _DATA)
    data.add_argument("kind", choices=("digits", "charts"), help="what the images show")
    data.add_argument("--out", required=True, help="folder to write to")
    for split in ("train", "val", "test"):
        data.add_argument(f"--{split}", type=int, help=f"rows of {split}, 0 for none")
    data.add_argument("--seed", type=int, default=0, help="another seed, other questions (0)")
    data.add_argument("--format", default="parquet", choices=("parquet", "jsonl", "hf"))
    data.add_argument("--overwrite", action="store_true", help="replace a set that stands there")

    command("info", _info, "show back ends, devices, packages and what to install", "")
    return top


def _train(options: argparse.Namespace) -> None:
    from roma.train.command import run

    run(options, _configs())


def _views(options: argparse.Namespace) -> None:
    from roma.views.corruptions import CORRUPTIONS, in_pools, load_levels
    from roma_kernels.errors import fail

    table = load_levels(options.level_table) if options.level_table else CORRUPTIONS
    if options.list:
        print(_corruptions(table))
        return
    if not options.images:
        fail(
            "IMAGE", "at least one image file", "none", "roma views photo.png, or roma views --list"
        )
    table = in_pools(options.pools, table)
    images = [Path(image) for image in options.images]
    outs = _one_each(images, Path(options.out))
    inputs = {image.resolve() for image in images}
    for out in outs:
        if out.resolve() in inputs:
            fail("--out", "a name that is no input's", str(out), "choose another")
    from roma.views.gallery import write_gallery

    for image, out in zip(images, outs, strict=True):
        print(
            write_gallery(image, out, corruptions=table, window=options.window, seed=options.seed)
        )


def _one_each(images: Sequence[Path], out: Path) -> list[Path]:
    """The file to write for each image: `out`, or OUT-IMAGE.png, numbered where two would agree."""
    if len(images) == 1:
        return [out]
    chosen: list[Path] = []
    for image in images:
        stem, turn = f"{out.stem}-{image.stem}", 1
        while (path := out.with_stem(stem if turn == 1 else f"{stem}-{turn}")) in chosen:
            turn += 1
        chosen.append(path)
    return chosen


def _corruptions(table: "Mapping[str, Corruption]") -> str:
    """The table of corruptions as text, a row for each."""
    most = max(len(row.levels) for row in table.values())
    lines = [["pool", "corruption", *(f"L{i + 1}" for i in range(most)), "training", "unit"]]
    for row in table.values():
        levels = [row.describe(level) for level in row.levels]
        ends = " to ".join(map(row.describe, row.training_range))
        lines.append(
            [row.pool, row.name, *levels, *[""] * (most - len(levels)), ends, row.full_unit]
        )
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join(
        "".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _data(options: argparse.Namespace) -> None:
    from roma.data.synthetic.charts import write_charts
    from roma.data.synthetic.digits import write_digits

    write = {"digits": write_digits, "charts": write_charts}[options.kind]
    sizes = {split: getattr(options, split) for split in ("train", "val", "test")}
    given = {split: size for split, size in sizes.items() if size is not None}
    written = write(
        options.out,
        **given,
        seed=options.seed,
        format=options.format,
        overwrite=options.overwrite,
        progress=_count_rows,
    )
    for split, path in written.items():
        print(f"{split}: {path}")


def _count_rows(split: str, done: int, size: int) -> None:
    """Shows on stderr how far a split is: a line that counts, or in a log one line at the end."""
    if sys.stderr.isatty():
        ended = "\n" if done == size else ""
        print(f"\r{split}: {done} of {size} rows", end=ended, file=sys.stderr, flush=True)
    elif done == size:
        print(f"{split}: {size} rows", file=sys.stderr)


def _info(_: argparse.Namespace) -> None:
    from roma.info import print_info

    print_info()


def _configs() -> list[Path]:
    """The example configurations: in the wheel within the package, in a clone beside it."""
    here = Path(__file__).parents[1]
    folders = (here / "configs", here.parent / "configs")
    found = next((folder for folder in folders if folder.is_dir()), folders[0])
    return sorted(found.glob("*.yaml"))


class _Version(argparse.Action):
    """Like argparse's own, but the version is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from roma_kernels import DISTRIBUTION, __version__

        print(DISTRIBUTION, __version__)
        parser.exit()


def _is_for_the_user(error: BaseException) -> bool:
    """Whether the message is worded for the user: by the system, or by these two packages.

    Worded is what a `raise` statement says, and an import of a package that is not installed. What
    else Python raises within our code (a bad unpacking, an int() of text) is a bug.
    """
    if isinstance(error, OSError):
        return True
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next:
        last = last.tb_next
    file = Path(last.tb_frame.f_code.co_filename)
    ours = any(file.is_relative_to(folder) for folder in _folders())
    return ours and (_is_a_raise(last) or _names_a_module(error))


def _folders() -> list[Path]:
    """Where the two packages lie."""
    import roma_kernels

    return [Path(__file__).parents[1], *map(Path, roma_kernels.__path__)]


def _is_a_raise(place: TracebackType) -> bool:
    """Whether the line that failed is a `raise` statement, by its bytecode."""
    code = place.tb_frame.f_code.co_code
    return dis.opname[code[place.tb_lasti]] == "RAISE_VARARGS"


def _names_a_module(error: BaseException) -> bool:
    """Whether it is Python's own word on a package that is not installed, without a remedy."""
    if not isinstance(error, ModuleNotFoundError) or not str(error).startswith("No module named"):
        return False
    return (error.name or "").partition(".")[0] not in ("roma", "roma_kernels")
