"""What is logged, with the formula of each metric; docs/METRICS.md says what is healthy.

Names are EasyR1's and verl's (actor/*, reward/*, val/*, response_length/*, timing_s/*, perf/*), so
that runs of different trainers can be compared; those with "roma" in them are ours. Where metrics
go is in `roma.train.loggers`.
"""

import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from roma import METRICS as LOSS_METRICS
from roma_kernels.errors import fail

LOGGED: dict[str, str] = {
    **{f"actor/{name}": meaning for name, meaning in LOSS_METRICS.items()},
    "actor/loss": f"{LOSS_METRICS['loss']}; with papo or dvrp + Σ coef·contrast",
    "actor/ppo_kl": "mean of old_logp − logp over the tokens of the rollouts that were run, nats",
    "actor/roma_penalty/{corruption}": "mean of D_i^k over right rollouts with such a view, nats",
    "actor/roma_worst_view/{corruption}": "share of right rollouts with this worst view, gated or "
    "not, 0..1",
    "actor/grad_norm": "L2 norm of the gradient over all parameters, before clipping",
    "actor/grad_norm/{term}": "L2 norm of the gradient of λ_inv·L_inv (inv), or of all other terms "
    "(rest), by the hidden states that the head reads",
    "actor/gradient_share": "grad_norm/inv / (grad_norm/inv + grad_norm/rest), 0..1",
    "actor/lambda_inv": "λ_inv of the step, where algorithm.control moves it",
    "actor/roma_penalty_right": "the penalty's mean over right rollouts that it has a view of, "
    "nats a token",
    "actor/roma_gate_bound": "divergence above which a view was left out of the step, nats",
    "actor/contrast_{view}": "agg_t min(k3, cap) of clean and noised or masked view, as it enters "
    "the loss, before its coefficient, nats",
    "actor/lr": "learning rate of the step's last update",
    "reward/failed": "share of rollouts whose reward raised, hung or made no sense, 0..1",
    "reward/{part}": "mean over the step's rollouts of that key of the reward, as accuracy",
    "reward/{part}/{kind}": "the same over rollouts on the clean, or on the noisy, image alone",
    "advantage/nonzero_share": "share of rollouts with A ≠ 0, 0..1; the others give no gradient",
    "advantage/mssr_value": "mean of v over rollouts with a reward, before the step, 0..1",
    "advantage/mssr_eta": "η, the share of α and β that the step's update of the tracker kept",
    "advantage/log_weight": "mean over counted tokens of |log w|, nats; w: srpo's or vgpo's weight",
    "advantage/srpo_unparsable": "share of responses without the tags as they should be, 0..1",
    "response_length/mean": "mean completion length, end token included, tokens",
    "response_length/max": "longest completion, tokens",
    "response_length/clip_ratio": "share of completions cut at data.max_response_length",
    "rollout/distinct_share": "distinct (prompt, completion) rows / rows, 0..1",
    "rollout/mismatch_mean": "mean over counted tokens of |logp - sampler's logp|, nats",
    "rollout/mismatch_p99": "99th percentile over counted tokens of |logp - sampler's logp|, nats",
    "rollout/off_policy_share": "share of rollouts left out as off-policy, 0..1",
    "rollout/weight_clipped_share": "share of counted tokens whose weight is cut or masked, 0..1",
    "val/accuracy": "share of validation rows answered right, greedy, clean images, 0..1",
    "val/{part}": "mean over the validation rows of that key of the reward",
    "views/level_mean": "mean level of the step's views, 0 to algorithm.views.max_level",
    "views/divergence_mean": "mean over views made for it of D, mean over right rollouts, nats",
    "timing_s/{stage}": "wall time of a stage of the step, s; timing_s/step is all of it",
    "timing_s/save": "wall time of the checkpoint after the step before, s",
    "timing_s/views": "wall time that the step waits for its views, s",
    "timing_s/make_views": "wall time of the thread that makes the views, mostly while sampling, s",
    "perf/tokens_per_second": "completion tokens of the step / timing_s/step",
    "perf/memory_mib": "memory in use when the step ends, of the GPU or else of the process, MiB",
    "perf/peak_memory_mib": "peak memory since the start, of the GPU or else of the process, MiB",
}
"""Every metric that the trainer logs, with formula and unit; a part in braces is any name.

`roma.METRICS` has those of the loss alone.
"""


class Logger(Protocol):
    """One destination of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step."""

    def close(self) -> None:
        """Writes what is still buffered."""


class MetricLog:
    """Several loggers as one; a context manager that closes them.

    Example:
        >>> from roma.train.loggers import ConsoleLogger
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

    def warn(self, lines: Sequence[str]) -> None:
        """Prints warnings on stderr, where a bar on the terminal makes room for them."""
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)

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


def memory(device: torch.device) -> float:
    """MiB in use: allocated on the device, or resident in the process on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_memory(device: torch.device) -> float:
    """MiB: of the device, or of the process on a CPU (Linux counts that in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _pattern(name: str) -> str:
    """A key of LOGGED as a regular expression; a part in braces matches a name without a slash."""
    return r"[^/]+".join(re.escape(part) for part in re.split(r"\{\w+\}", name))
