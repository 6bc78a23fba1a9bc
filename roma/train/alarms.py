"""Warnings, a line each, of what kills runs: read off the metrics of each step.

An alarm goes off when its condition has held for some steps in a row, says so once, and can go off
again only after the metric has come back past a second, milder bound. Derivations and remedies:
docs/METRICS.md. Nothing here stops a run.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from roma.train.config import Config
from roma.train.config.check_losses import CONTRASTS

Read = Callable[[Mapping[str, float]], float | None]  # None: not known at this step

WINDOW = 20  # steps that the usual value of a metric is the median of
SETTLED = 10  # of them at least, before a value is called unusual


class Alarms:
    """All alarms of a run.

    A resumed run starts without a history: an alarm that still holds is said once more.

    Args:
        config: of the run: group size, rollouts a step, and which terms the loss has.

    Example:
        >>> from roma.train.config import load_config
        >>> run = load_config(None, ["data.train_files=d", "worker.actor.model_path=m"])
        >>> Alarms(run).check(7, {"actor/grad_norm": float("nan")})[0][:59]
        'step 7: actor/grad_norm is nan: the update is lost and the '
    """

    def __init__(self, config: Config) -> None:
        """Every alarm is off."""
        self._watched = _watched(config)

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings of a step.

        Args:
            step: its number.
            metrics: what the step logs; an alarm whose metric is missing keeps its state.

        Returns:
            A line for each alarm that goes off now; most often none.
        """
        found = (line for watched in self._watched for line in watched.check(metrics))
        return [f"step {step}: {line}" for line in found]


@dataclass
class _Alarm:
    """One condition on one number, with its memory."""

    says: str
    bad: Callable[[float, float | None], int]  # strikes, by value and usual one (None: not SETTLED)
    good: Callable[[float, float | None], bool]
    patience: int = 1  # strikes, on steps in a row
    held: int = 0
    on: bool = False

    def check(self, value: float, usual: float | None) -> tuple[bool, bool]:
        """Whether the value is a bad one, and whether the alarm goes off now."""
        strikes = self.bad(value, usual)
        if self.on:
            self.on = not self.good(value, usual)
            self.held = 0
            return strikes > 0, False
        self.held = self.held + strikes if strikes else 0
        self.on = self.held >= self.patience
        return strikes > 0, self.on


class _Watched:
    """A number, its usual value, and the alarms on it."""

    def __init__(self, name: str, *alarms: _Alarm, read: Read | None = None) -> None:
        self.name, self.alarms = name, alarms
        self.read: Read = read or (lambda metrics: metrics.get(name))
        self.past: deque[float] = deque(maxlen=WINDOW)

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        value = self.read(metrics)
        if value is None:
            return []
        usual = median(self.past) if len(self.past) >= SETTLED else None
        found = [(alarm, *alarm.check(value, usual)) for alarm in self.alarms]
        if math.isfinite(value) and not any(bad for _, bad, _ in found):
            self.past.append(value)  # what is called unusual does not become usual
        before = "" if usual is None else f" (usually {usual:.3g})"
        return [
            f"{self.name} is {value:.3g}{before}: {alarm.says}" for alarm, _, off in found if off
        ]


def _watched(config: Config) -> list[_Watched]:
    group = config.worker.rollout.n
    rollouts = config.data.rollout_batch_size * group
    alike = "of its group", "a higher worker.rollout.n or temperature"
    if config.algorithm.adv_estimator == "mssr":  # n is 1: the step is the group
        alike = "of the step", "a higher data.rollout_batch_size or temperature"
    watched = [
        _Watched("actor/loss", _not_finite("every weight may be by now; go back to a checkpoint")),
        _Watched(
            "actor/grad_norm",
            _not_finite("the update is lost and the weights may be too; go back to a checkpoint"),
            _jump(
                "it leaves its usual size; lower worker.actor.lr, or max_grad_norm, and look at "
                "the last rewards"
            ),
        ),
        _Watched(
            "response_length/clip_ratio",
            _high(
                0.25,
                0.15,
                "answers are cut at data.max_response_length and scored as if that were all; "
                "raise it, or look for loops in the answers",
                patience=3,
            ),
        ),
        _Watched(
            "advantage/nonzero_share",
            _flat(
                f"no rollout is better than another {alike[0]}, so nothing is learnt; take harder "
                f"or easier questions, {alike[1]}",
                patience=3,
            ),
        ),
        _Watched(
            "reward/failed",
            _high(
                0.1,
                0.05,
                "the reward fails on rollouts, which teach nothing; see reward_failures.jsonl",
            ),
        ),
        _Watched(
            "reward/format",
            _flat(
                "no answer has the format, so that part of the reward teaches nothing; check the "
                "prompt (data.format_prompt) and, with <think>, data.plain_think_tokens",
                # A format of one answer in a hundred is missed by 460 of them in 1 % of cases.
                patience=max(5, math.ceil(460 / rollouts)),
            ),
        ),
        _Watched(
            "rollout/mismatch_mean",
            _high(
                0.1,
                0.05,
                "sampler and trainer disagree; its weights may be old, or its precision too low "
                "(worker.rollout.weight corrects for a little of it)",
                patience=2,
            ),
        ),
    ]
    if group > 1:
        watched.append(_collapse(group))
    if config.algorithm.view_mode == "roma" and config.algorithm.roma.penalises:
        watched.append(_penalty(config))
    if config.algorithm.view_mode in CONTRASTS:
        watched.append(_masked())
    if config.algorithm.control.target != "none":
        watched.append(_control(config.algorithm.control.low, config.algorithm.control.high))
    return watched


def _collapse(group: int) -> _Watched:
    """A prompt whose rollouts are all alike has one distinct row of G: no advantage, no gradient.

    Distinct rows a prompt, less one, bound the share of prompts that have two different ones.
    """

    def read(metrics: Mapping[str, float]) -> float | None:
        share = metrics.get("rollout/distinct_share")
        return None if share is None else share * group - 1

    alarm = _Alarm(
        "nearly all rollouts of a prompt are equal, the policy no longer explores; raise "
        "worker.rollout.temperature, or go back to a checkpoint with a lower learning rate",
        bad=lambda value, _: value < 0.05,
        good=lambda value, _: value > 0.1,
        patience=3,
    )
    return _Watched("rollout/distinct_share · n - 1", alarm, read=read)


def _penalty(config: Config) -> _Watched:
    algorithm = config.algorithm
    gated = algorithm.roma.gates or algorithm.views.gate_quantile is not None
    # What a gate leaves out is in the mean alone, and says how far the views go.
    name = "actor/roma_penalty_mean" if gated else "actor/roma_penalty_worst"

    every = algorithm.penalised == "every"
    share, whose = "reward/accuracy", "right answers"
    if every:
        share, whose = "(1 - reward/failed)", "answers"

    def read(metrics: Mapping[str, float]) -> float | None:
        penalty, counted = metrics.get(name), metrics.get("reward/accuracy")
        if every:
            counted = 1 - metrics.get("reward/failed", 0.0)
        return penalty / counted if penalty is not None and counted else None  # none: none has it

    gone = _Alarm(
        f"views no longer change {whose}; are they degraded at all (algorithm.views), do the "
        "answers still depend on the image?",
        bad=lambda value, usual: value < max(1e-6, (usual or 0) / 100),
        good=lambda value, usual: value > max(1e-5, (usual or 0) / 10),
        patience=3,
    )
    jump = _jump(
        f"views change {whose} far more than they used to; lower the levels "
        "(algorithm.views.max_level) or worker.actor.lr"
    )
    return _Watched(f"{name} / {share}", gone, jump, read=read)


def _masked() -> _Watched:
    jump = _jump(
        "answers leave the masked image's far faster than they used to, which the term rewards "
        "without end; lower its coefficient, or cap (0.2 is PAPO's remedy)"
    )
    return _Watched("actor/contrast_masked", jump)


def _control(low: float, high: float) -> _Watched:
    stuck = _Alarm(
        "it stays at a bound (algorithm.control.low, high): the target is out of reach, or has the "
        "wrong size; give another algorithm.control.value, or widen the bounds",
        bad=lambda value, _: not low < value < high,
        good=lambda value, _: 2 * low < value < high / 2,
        patience=20,
    )
    return _Watched("actor/lambda_inv", stuck)


def _not_finite(says: str) -> _Alarm:
    return _Alarm(
        says,
        bad=lambda value, _: not math.isfinite(value),
        good=lambda value, _: math.isfinite(value),
    )


def _jump(says: str) -> _Alarm:
    """Ten times the usual value twice in a row, or a hundred times at once.

    One jump of ten is clipped (gradients) or averaged away: healthy runs have such (METRICS.md).
    """

    def strikes(value: float, usual: float | None) -> int:
        if not usual or value == math.inf:
            return 0
        return (value > 10 * usual) + (value > 100 * usual)

    def good(value: float, usual: float | None) -> bool:
        return usual is None or value < 5 * usual

    return _Alarm(says, strikes, good, patience=2)


def _high(bound: float, clear: float, says: str, *, patience: int = 1) -> _Alarm:
    return _Alarm(
        says,
        bad=lambda value, _: value > bound,
        good=lambda value, _: value < clear,
        patience=patience,
    )


def _flat(says: str, *, patience: int) -> _Alarm:
    return _Alarm(
        says, bad=lambda value, _: value == 0, good=lambda value, _: value != 0, patience=patience
    )
