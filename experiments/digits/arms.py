"""The arms of the demo: what each changes of configs/demo.yaml, and the methods beside them."""

from collections.abc import Sequence

from experiments.runner.jobs import Arm
from roma_kernels.errors import fail

MILD = "algorithm.views.max_level=2"
"""Views milder than the demo's: below its evaluation's third level."""

ARMS = {
    "grpo": Arm(("algorithm.view_mode=none",)),
    "roma": Arm(("algorithm.view_mode=roma",)),
    "grpo_equal_time": Arm(("algorithm.view_mode=none",)),
    "naive": Arm(("algorithm.view_mode=rollout",)),
    "naive_mild": Arm(("algorithm.view_mode=rollout", MILD)),
}
"""The arms that every demo has."""

_ROMA = ("algorithm.view_mode=roma",)
METHODS = {
    "mssr": Arm(file="demo_mssr.yaml"),
    "srpo": Arm(file="demo_srpo.yaml"),
    "vgpo": Arm(file="demo_vgpo.yaml"),
    "papo": Arm(file="demo_papo.yaml"),
    "noisyrollout": Arm(file="demo_noisyrollout.yaml"),
    "dvrp": Arm(file="demo_dvrp.yaml"),
    "mssr_roma": Arm(_ROMA, "demo_mssr.yaml"),
    "srpo_roma": Arm(_ROMA, "demo_srpo.yaml"),
    "vgpo_roma": Arm(_ROMA, "demo_vgpo.yaml"),
}
"""Method → its arm; with "_roma", the method and ROMA's views in the loss."""


def methods_of(names: Sequence[str]) -> list[str]:
    """Names of methods, checked.

    Raises:
        ValueError: a name that no method has, or one twice.
    """
    for name in names:
        if name not in METHODS:
            fail("methods", f"some of {', '.join(METHODS)}", repr(name), "correct METHOD")
    if len(set(names)) < len(names):
        fail("methods", "each once", " ".join(names), "name it once")
    return list(names)
