"""Options of views that are made after the rollouts; a string below a field explains it."""

from dataclasses import dataclass

from roma.train.config.schema import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Sub-section `algorithm.views.attack`: views against the policy (PGD), ours."""

    count: NonNegativeInt = 0
    """Number of the K views that are attacks, beside those of the pool; with pool "adversarial" all
    are."""
    steps: PositiveInt = 3
    """Steps of gradient ascent, each a forward and a backward pass to the pixels."""
    step_size: PositiveFloat | None = None
    """Size of a step, 8-bit levels; null: 2.5·eps/steps."""
