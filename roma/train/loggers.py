"""Where metrics go: the console, metrics.jsonl, TensorBoard, W&B, Trackio.

Each goes on where a resumed run left off. Packages of the last three are imported when they are
asked for. On several ranks only rank 0 logs: `open_log(..., active=rank == 0)`.
"""

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from roma.train.metrics import Logger, MetricLog
from roma.train.progress import ProgressLogger
from roma_kernels.errors import fail

_CONSOLE = {
    "reward/overall": "reward",
    "reward/accuracy": "accuracy",
    "val/accuracy": "val",
    "actor/loss": "loss",
    "actor/roma_penalty_worst": "penalty",
    "actor/grad_norm": "grad",
    "response_length/mean": "length",
    "rollout/distinct_share": "distinct",
}


def open_log(
    names: Sequence[str],
    out: str | Path,
    *,
    total_steps: int | None = None,
    resumed_at: int | None = None,
    project: str = "roma",
    experiment: str | None = None,
    config: Mapping[str, Any] | None = None,
    console: Console | None = None,
    active: bool = True,
) -> MetricLog:
    """Opens the loggers that `trainer.logger` names, writing below the run folder `out`.

    Args:
        names: some of "console", "file", "tensorboard", "wandb", "trackio".
        out: the run folder; made if missing.
        total_steps: shown on the console.
        resumed_at: the step of the checkpoint from which the run goes on; what was logged after it
            is dropped. None for a new run, which starts its logs anew.
        project: in W&B and Trackio.
        experiment: in both; None for the run folder's name.
        config: saved with the run in both.
        console: prints the lines, or on a terminal the bar; None: that of stdout.
        active: False on every rank but 0: nothing is opened or written.

    Raises:
        ValueError: an unknown name.
        ImportError: the package of a logger is not installed.
    """
    if not active:
        return MetricLog([])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    title, resumed = experiment or out.name, resumed_at is not None
    loggers: list[Logger] = []
    for name in names:
        if name == "console":
            loggers.append(_console_logger(console or Console(), total_steps, resumed_at))
        elif name == "file":
            loggers.append(FileLogger(out / "metrics.jsonl", resumed_at=resumed_at))
        elif name == "tensorboard":
            loggers.append(TensorBoardLogger(out / "tensorboard", resumed_at=resumed_at))
        elif name == "wandb":
            run = WandbLogger(out, project=project, name=title, config=config, resumed=resumed)
            loggers.append(run)
        elif name == "trackio":
            loggers.append(
                TrackioLogger(project=project, name=title, config=config, resumed=resumed)
            )
        else:
            choices = "console, file, tensorboard, wandb or trackio"
            fail("trainer.logger", choices, repr(name), "correct the name")
    return MetricLog(loggers)


def _console_logger(console: Console, total_steps: int | None, resumed_at: int | None) -> Logger:
    """A bar on a terminal, else lines, as a log file can keep them."""
    if console.is_terminal:
        return ProgressLogger(console, total_steps=total_steps, resumed_at=resumed_at)
    return ConsoleLogger(total_steps=total_steps, console=console)


class ConsoleLogger:
    """One compact line a step: reward, accuracy, loss, penalty, gradient, length, time."""

    def __init__(self, *, total_steps: int | None = None, console: Console | None = None) -> None:
        """Prints to `console`, by default the terminal."""
        self._console = console or Console()
        self._total = total_steps

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the line."""
        of = f"{step:>{len(str(self._total))}}/{self._total}" if self._total else str(step)
        shown = [
            f"{short} {values[name]:.3f}" for name, short in _CONSOLE.items() if name in values
        ]
        if "timing_s/step" in values:
            shown.append(f"{values['timing_s/step']:.2f} s")
        # soft_wrap: rich assumes a width for a pipe and would break the line there.
        self._console.print(Text("  ".join([f"step {of}", *shown])), soft_wrap=True)

    def close(self) -> None:
        """Nothing is buffered."""


class JsonLines:
    """A file of JSON objects, one a line, each with its step; on disk when `write` returns."""

    def __init__(self, path: str | Path, *, resumed_at: int | None = None) -> None:
        """Opens `path`; of an older file only the lines up to step `resumed_at` are kept."""
        path = Path(path)
        kept = []
        if resumed_at is not None and path.exists():
            # Not splitlines, which also cuts at separators that JSON leaves in a text.
            for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
                if _step_of(line) <= resumed_at:
                    kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each row."""
        lines = (json.dumps({"step": step, **row}) + "\n" for row in rows)
        self._file.write("".join(lines))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class FileLogger(JsonLines):
    """metrics.jsonl: one line a step.

    JSON has no NaN and no infinity: such a value is written as null.
    """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the line."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.write(step, [finite])


class TensorBoardLogger:
    """Event files for TensorBoard, in a folder of their own."""

    def __init__(self, folder: str | Path, *, resumed_at: int | None = None) -> None:
        """Opens a writer; TensorBoard hides what older files hold after `resumed_at`."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(_missing("tensorboard")) from error
        purge = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the writer."""
        self._writer.close()


class WandbLogger:
    """A run in W&B; resuming goes on with the same run, by the id kept in `out/wandb_run_id`."""

    def __init__(
        self,
        out: str | Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any] | None,
        resumed: bool,
    ) -> None:
        """Starts the run, or goes on with it."""
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(_missing("wandb")) from error
        kept = Path(out) / "wandb_run_id"
        run_id = kept.read_text().strip() if resumed and kept.exists() else None
        settings = {"dir": str(out), "id": run_id, "resume": "allow" if run_id else None}
        plain = dict(config or {})
        self._run = wandb.init(project=project, name=name, config=plain, **settings)
        # W&B's own step counter cannot go back to a checkpoint; a metric as the axis can.
        self._run.define_metric("*", step_metric="step")
        kept.write_text(self._run.id + "\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the metrics."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class TrackioLogger:
    """A run in Trackio, kept on this machine; `trackio show` opens its page.

    A resumed run goes on with the newest of its name. Trackio cannot take back what was logged
    after the checkpoint: those steps stand there twice.
    """

    def __init__(
        self, *, project: str, name: str, config: Mapping[str, Any] | None, resumed: bool
    ) -> None:
        """Starts the run, or goes on with it."""
        try:
            trackio = importlib.import_module("trackio")
        except ImportError as error:
            raise ImportError(_missing("trackio")) from error
        resume = "allow" if resumed else "never"
        self._run = trackio.init(
            project=project, name=name, config=dict(config or {}), resume=resume, embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the metrics."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; ∞ for a line cut short by a crash, which is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _missing(package: str) -> str:
    remedy = f"pip install {package}, or take it out of trainer.logger"
    return f"trainer.logger: expected the package {package}, got none installed; {remedy}"
