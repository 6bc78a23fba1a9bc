"""Numbers of the loss that move from step to step: λ_inv, and the bound of the legibility gate.

Both are ours, read off what a step has measured over all ranks, and take effect in the next one. So
every rank has the same, and a resumed run goes on with what the checkpoint has.
"""

import math
from typing import Any

import torch
from torch import Tensor

from roma.train import ranks
from roma.train.config.losses import ControlConfig

DECAY = 0.9  # of the bound of the gate: about the last ten steps


class LambdaControl:
    """λ_inv that holds a target (MATH.md section 2: its scale depends on model and task).

        penalty          log λ += rate · clip((D − value) / value, ±1)
        gradient_share   log λ += rate · clip(logit(value) − logit(s), ±1)

    D is the mean penalty of right rollouts, nats a token, but for those of which the legibility
    gate leaves no view. The first is dual ascent on the Lagrangian of "maximise the reward subject
    to D ≤ value", in log λ, so that λ stays positive.
    s = λ·g / (λ·g + m) is the penalty's share of the gradients' norms, g and m as they stand; the λ
    that would make it `value` lies logit(value) − logit(s) away, so that rate 1 goes all the way.
    λ stays within [low, high]. A step without a right rollout, or without one of the two gradients,
    moves nothing.

    Args:
        options: target, value, rate and bounds.
        start: λ_inv of the first step.

    Attributes:
        value: λ_inv now.

    Example:
        >>> control = LambdaControl(ControlConfig(target="penalty", value=0.02, rate=0.5), 1.0)
        >>> control.on_penalty(step=1, penalty=0.03)
        >>> round(control.value, 3)
        1.284
    """

    def __init__(self, options: ControlConfig, start: float) -> None:
        """Nothing has been measured."""
        self.options, self.value = options, start

    @property
    def on(self) -> bool:
        """Whether λ_inv moves at all."""
        return self.options.target != "none"

    def measures(self, step: int) -> bool:
        """Whether a step, counted from 1, has to measure the gradients' norms."""
        return self.options.target == "gradient_share" and self._due(step)

    def on_penalty(self, step: int, penalty: float | None) -> None:
        """After a step with this mean penalty of right rollouts, nats; None: there was none."""
        if self.options.target != "penalty" or penalty is None or not self._due(step):
            return
        assert self.options.value is not None  # the configuration's own check
        self._move((penalty - self.options.value) / self.options.value)

    def on_norms(self, step: int, penalty: float, rest: float) -> None:
        """After a step whose first update had gradients of these norms, λ included."""
        if not self.measures(step) or not (penalty > 0 and rest > 0):
            return
        assert self.options.value is not None
        self._move(math.log(self.options.value / (1 - self.options.value) * rest / penalty))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"lambda_inv": self.value} if self.on else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with a saved λ_inv, within this run's bounds; with none as it is given."""
        if self.on and "lambda_inv" in state:
            self.value = self._bounded(state["lambda_inv"])

    def _due(self, step: int) -> bool:
        return step % self.options.every == 0

    def _move(self, off: float) -> None:
        if math.isfinite(off):
            factor = math.exp(self.options.rate * min(max(off, -1.0), 1.0))
            self.value = self._bounded(self.value * factor)

    def _bounded(self, value: float) -> float:
        return min(max(value, self.options.low), self.options.high)


class Gate:
    """The bound of the legibility gate: a running quantile of the divergences of right rollouts.

        bound ← q_step in the first step, then DECAY·bound + (1 − DECAY)·q_step

    q_step: the quantile over all (view, right rollout) pairs of a step, of all ranks, whether the
    gate left them out or not. A step without such a pair moves nothing.

    Args:
        quantile: 0..1; None: no gate.

    Attributes:
        bound: nats; None: no step has given one.

    Example:
        >>> gate = Gate(0.5)
        >>> gate.observe(torch.tensor([[0.1, float("nan"), 0.3]]))
        >>> round(gate.bound, 3)
        0.2
    """

    def __init__(self, quantile: float | None) -> None:
        """Nothing has been seen."""
        self.quantile = quantile
        self.bound: float | None = None

    def observe(self, divergence: Tensor) -> None:
        """After a step, with this rank's divergences, nats, any shape; NaN: not a right rollout's.

        Every rank calls.
        """
        if self.quantile is None:
            return
        every = ranks.gathered(divergence.flatten()).double()
        every = every[every.isfinite()]
        if not len(every):
            return
        own = _quantile(every, self.quantile)
        self.bound = own if self.bound is None else DECAY * self.bound + (1 - DECAY) * own

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {} if self.quantile is None else {"gate_bound": self.bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with a saved bound, if there is one."""
        if self.quantile is not None:
            self.bound = state.get("gate_bound")


def _quantile(values: Tensor, share: float) -> float:
    """By linear interpolation; unlike torch.quantile without a limit of 16 M values."""
    at = share * (len(values) - 1)
    ends = [float(values.kthvalue(int(x) + 1).values) for x in (math.floor(at), math.ceil(at))]
    return ends[0] + (at - math.floor(at)) * (ends[1] - ends[0])


def as_scalar(value: float, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor, so that the loss does not compile anew when it changes."""
    return torch.tensor(value, dtype=torch.float32, device=device)
