"""Sub-sections of `algorithm` that concern the loss: papo, dvrp, control.

As in `roma.train.config.sections`, a string below a field says what it means.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from roma.train.config.schema import NonNegativeFloat, PositiveFloat, PositiveInt, Range

Probability = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class PapoConfig:
    """Sub-section `algorithm.papo`: the term of PAPO (arXiv 2507.06448), with view_mode=papo."""

    coef: NonNegativeFloat = 0.01
    """γ: the loss falls by γ·KL(clean ‖ masked), nats a token; published are 0.01 and 0.02."""
    probability: Probability = 0.6
    """Chance of a patch of 14 x 14 pixels to be black."""
    cap: PositiveFloat = 10.0
    """Highest k3 of a token, nats, with no gradient beyond, as PAPO's code has it; 0.2 is its own
    remedy where the term grows without bound."""


@dataclass(frozen=True, kw_only=True)
class DvrpConfig:
    """Sub-section `algorithm.dvrp`: the terms of DVRP (arXiv 2601.06801), with view_mode=dvrp."""

    noised_coef: NonNegativeFloat = 0.01
    """The loss rises by it times KL(clean ‖ noised), nats a token. The noised view is drawn from
    algorithm.views.pool."""
    masked_coef: NonNegativeFloat = 0.01
    """The loss falls by it times KL(clean ‖ masked), nats a token."""
    probability: Probability = 0.6
    """Chance of a patch of 14 x 14 pixels to be black."""
    cap: PositiveFloat = 10.0
    """Highest k3 of a token, nats, with no gradient beyond (ours, as PAPO's)."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Sub-section `algorithm.control`: λ_inv moves from step to step towards a target (ours)."""

    target: Literal["none", "penalty", "gradient_share"] = "none"
    """What is held at `value`. "penalty": the mean of the penalty over right rollouts of which the
    gate leaves a view, nats a token; more of it raises λ_inv. "gradient_share": the penalty's share
    of the two gradients' norms on the head's input, 0..1; less of it raises λ_inv. "none": λ_inv
    stays as it is given."""
    value: PositiveFloat | None = None
    """The target. With a target it must be given."""
    rate: PositiveFloat = 0.1
    """How far log λ_inv moves: "penalty": rate times (penalty - value) / value; "gradient_share":
    rate times the way to the λ_inv that would give the share now. Either is taken within ± rate."""
    every: PositiveInt = 1
    """Steps from one move to the next. A share is measured then, on the step's first update: two
    more sweeps of the head, and their backward to its input."""
    low: PositiveFloat = 1e-3
    """Lowest λ_inv."""
    high: PositiveFloat = 100.0
    """Highest λ_inv."""
