"""NoisyRollout: some rollouts of a prompt see a degraded image, less and less of it over a run.

The rollouts on the clean and on the degraded image of a prompt are one group, all log-probs are
those on the clean image (arXiv 2504.13055; docs/MATH.md section 5). What is computed here is how
strong the degradation of a step is.
"""

import math

from roma_kernels.arguments import check_positive
from roma_kernels.errors import fail


def noise_share(
    step: float, total_steps: float, *, steepness: float = 30.0, midpoint: float
) -> float:
    """The share of the first noise strength that is left at a step, falling from 1 to 0.

        α_t/α_0 = 1 − 1/(1 + exp(−λ(t − γ)/t_max))

    (NoisyRollout, arXiv 2504.13055.) It is 1/2 at γ, and only near 1 at the start: λ and γ decide
    how near. Published for 60 steps: λ = 30, γ = 40.

    Args:
        step: t.
        total_steps: t_max > 0.
        steepness: λ > 0.
        midpoint: γ, in steps as `step`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: a number that is not finite, or total_steps or steepness ≤ 0.

    Example:
        >>> [round(noise_share(step, 60, midpoint=40), 3) for step in (0, 38, 40, 42, 60)]
        [1.0, 0.731, 0.5, 0.269, 0.0]
    """
    check_positive("total_steps", total_steps, "give the number of steps of the run")
    check_positive("steepness", steepness, "30 is the published one")
    for name, value in (("step", step), ("midpoint", midpoint)):
        if not math.isfinite(value):
            fail(name, "a finite number", str(value), "give it in steps")
    x = steepness * (step - midpoint) / total_steps
    # 1 − σ(x) = σ(−x), by whichever exponential does not overflow.
    return math.exp(-x) / (1 + math.exp(-x)) if x > 0 else 1 / (1 + math.exp(x))
