"""Options of the sibling methods, sub-sections of `algorithm`; a string explains each."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from roma.train.config.schema import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Share

LOG_2 = math.log(2)
PositiveShare = Annotated[float, Range(above=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class MssrConfig:
    """Sub-section `algorithm.mssr`: of adv_estimator mssr (MATH.md section 4)."""

    target_kl: PositiveFloat = 0.01
    """Mean actor/ppo_kl of the last 20 steps at which the tracker's memory is shortest, nats. With
    one optimizer step a training step that KL is 0."""
    forgetting: Literal["monotone", "published"] = "monotone"
    """How the memory follows the KL: "monotone": the shorter, the more the policy moves;
    "published": shortest at KL 0, longest at the target, and shortest again above it."""
    entropy: Literal["sampled", "full"] = "sampled"
    """H of the shaping: "sampled": -p·log p of the sampled token, as published; "full": the
    entropy of the token's whole distribution."""
    entropy_coef: NonNegativeFloat = 0.4
    """Weight of H in the advantage; 0: none, and no pass to score the rollouts."""
    entropy_divisor: Annotated[float, Range(above=1)] = 2.0
    """H adds at most |A| over this."""
    prioritised: bool = False
    """Draw questions by √(v(1 - v)) + 0.05 of their tracked value (SPO), none twice a step; false:
    each once an epoch."""


@dataclass(frozen=True, kw_only=True)
class SrpoConfig:
    """Sub-section `algorithm.srpo`: of reweight srpo (MATH.md section 4)."""

    contrast: Literal["view", "blind"] = "blind"
    """What reasoning tokens are scored without: "blind": the response's perception text; "view":
    the image, whose patches are blackened, as for perception tokens, which saves a pass."""
    tau: PositiveFloat = 1.0
    """Temperature of the weights."""
    clip: PositiveFloat = 5.0
    """Bound of a token's contrast, nats."""
    limit: PositiveFloat = LOG_2
    """Bound of a weight's logarithm, before the weights of a response are divided by their mean."""
    perception_tag: tuple[str, str] = ("<perception>", "</perception>")
    """What opens and what closes the text of what is seen."""
    reasoning_tag: tuple[str, str] = ("<think>", "</think>")
    """What opens and what closes the reasoning; the answer behind it belongs to it. The text that
    closes the first of the two blocks may open the second."""


@dataclass(frozen=True, kw_only=True)
class VgpoConfig:
    """Sub-section `algorithm.vgpo`: of reweight vgpo (MATH.md section 4)."""

    beta: NonNegativeFloat = 0.3
    """Compensation of the last token, if it looks at the image."""
    gamma: PositiveShare = 0.5
    """Share of a response, its end, in which tokens are compensated."""
    kappa: PositiveShare = 0.2
    """Share of that end's tokens, those most like the image, that are."""
    variant: Literal["paper", "code"] = "paper"
    """Formulas of the paper, or those of its code, where the two differ."""


@dataclass(frozen=True, kw_only=True)
class NoisyRolloutConfig:
    """Sub-section `algorithm.noisy_rollout`: of view_mode noisy_rollout (MATH.md section 5)."""

    noisy: PositiveInt | None = None
    """How many of a prompt's n rollouts see the degraded image; null: half of them, rounded
    down."""
    anneal: bool = True
    """Lower the highest level over the run, as the share 1 - sigmoid(steepness·(t/T - midpoint))
    of views.max_level at step t of T."""
    steepness: PositiveFloat = 30.0
    """How fast."""
    midpoint: Share = 2 / 3
    """Where half of it is gone, as a share of trainer.total_steps."""
