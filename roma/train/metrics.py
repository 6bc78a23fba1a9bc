"""What is logged, with the formula of each metric, and where it goes.

Names are EasyR1's and verl's (actor/*, reward/*, val/*, response_length/*, timing_s/*, perf/*), so
that runs of different trainers can be compared; those with "roma" in them are ours.
"""

import importlib
import json
import math
import os
import re
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.text import Text

from roma import METRICS as LOSS_METRICS
from roma_kernels.errors import fail

LOGGED: dict[str, str] = {
    **{f"actor/{name}": meaning for name, meaning in LOSS_METRICS.items()},
    "actor/ppo_kl": "mean of old_logp − logp over the tokens of the rollouts that were run, nats",
    "actor/roma_penalty/{corruption}": "mean of D_i^k over right rollouts with such a view, nats",
    "actor/roma_worst_view/{corruption}": "share of right rollouts with this worst view, 0..1",
    "actor/grad_norm": "L2 norm of the gradient over all parameters, before clipping",
    "actor/grad_norm/{term}": "the same of one term (main, aux, inv), its λ included",
    "actor/lr": "learning rate of the step's last update",
    "actor/entropy": "mean over counted tokens of H = lse - Σ p·z on the clean image, nats",
    "reward/{part}": "mean over the step's rollouts of that key of the reward, as accuracy",
    "advantage/nonzero_share": "share of rollouts with A ≠ 0, 0..1; the others give no gradient",
    "response_length/mean": "mean completion length, end token included, tokens",
    "response_length/max": "longest completion, tokens",
    "response_length/clip_ratio": "share of completions cut at data.max_response_length",
    "rollout/distinct_share": "distinct (prompt, completion) rows / rows, 0..1",
    "val/accuracy": "share of validation rows answered right, greedy, clean images, 0..1",
    "val/{part}": "mean over the validation rows of that key of the reward",
    "views/level_mean": "mean level of the step's views, 0 to algorithm.views.max_level",
    "timing_s/{stage}": "wall time of a stage of the step, s; timing_s/step is all of it",
    "timing_s/views": "wall time that the step waits for its views, s",
    "timing_s/make_views": "wall time of the thread that makes the views, mostly while sampling, s",
    "perf/tokens_per_second": "completion tokens of the step / timing_s/step",
    "perf/peak_memory_mib": "peak memory since the start, of the GPU or else of the process, MiB",
}
"""Every metric that the trainer logs, with formula and unit; a part in braces is any name.

`roma.METRICS` has those of the loss alone.
"""

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


class Logger(Protocol):
    """One destination of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""

    def close(self) -> None:
        """Writes what is still buffered."""


class MetricLog:
    """Several loggers as one; a context manager that closes them.

    Example:
        >>> with MetricLog([ConsoleLogger(total_steps=300)]) as log:
        ...     log.log(7, {"reward/overall": 0.75, "timing_s/step": 0.5})
        step   7/300  reward 0.750  0.50 s
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        """Takes the loggers; none at all is fine."""
        self.loggers = list(loggers)
        self._known: set[str] = set()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hands a step's metrics (numbers or 0-dim tensors) to every logger.

        Raises:
            ValueError: a name that `LOGGED` does not explain.
        """
        for name in values.keys() - self._known:
            if not any(re.fullmatch(_pattern(known), name) for known in LOGGED):
                fail(
                    "metric",
                    "a name in roma.train.metrics.LOGGED",
                    repr(name),
                    "write its formula there",
                )
            self._known.add(name)
        numbers = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        """Closes every logger."""
        for logger in self.loggers:
            logger.close()

    def __enter__(self) -> "MetricLog":
        """The log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes every logger."""
        self.close()


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
) -> MetricLog:
    """Opens the loggers that `trainer.logger` names, writing below the run folder `out`.

    Args:
        names: some of "console", "file", "tensorboard", "wandb".
        out: the run folder; made if missing.
        total_steps: shown on the console.
        resumed_at: the step of the checkpoint from which the run goes on; what was logged after it
            is dropped. None for a new run, which starts its logs anew.
        project: in W&B.
        experiment: in W&B; None for the run folder's name.
        config: saved with the run in W&B.
        console: prints the lines; that of a progress display keeps them above its bars.

    Raises:
        ValueError: an unknown name.
        ImportError: the package of a logger is not installed.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = []
    for name in names:
        if name == "console":
            loggers.append(ConsoleLogger(total_steps=total_steps, console=console))
        elif name == "file":
            loggers.append(FileLogger(out / "metrics.jsonl", resumed_at=resumed_at))
        elif name == "tensorboard":
            loggers.append(TensorBoardLogger(out / "tensorboard", resumed_at=resumed_at))
        elif name == "wandb":
            title, resumed = experiment or out.name, resumed_at is not None
            wandb = WandbLogger(out, project=project, name=title, config=config, resumed=resumed)
            loggers.append(wandb)
        else:
            choices = "console, file, tensorboard or wandb"
            fail("trainer.logger", choices, repr(name), "correct the name")
    return MetricLog(loggers)


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
            for line in path.read_text(encoding="utf-8").splitlines():
                if _step_of(line) <= resumed_at:
                    kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each row."""
        lines = (json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
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


class Stopwatch:
    """Wall times of named stages.

    Example:
        >>> clock = Stopwatch()
        >>> with clock.stage("gen"):
        ...     pass
        >>> list(clock.metrics)
        ['timing_s/gen']
    """

    def __init__(self) -> None:
        """Nothing is timed yet."""
        self.metrics: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what runs inside the context."""
        start = time.perf_counter()
        yield
        self.metrics[f"timing_s/{name}"] = time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """MiB: of the device, or of the process on a CPU (Linux counts that in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _pattern(name: str) -> str:
    """A key of LOGGED as a regular expression; a part in braces matches a name without a slash."""
    return r"[^/]+".join(re.escape(part) for part in re.split(r"\{\w+\}", name))


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; ∞ for a line cut short by a crash, which is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _missing(package: str) -> str:
    remedy = f"pip install {package}, or take it out of trainer.logger"
    return f"trainer.logger: expected the package {package}, got none installed; {remedy}"
