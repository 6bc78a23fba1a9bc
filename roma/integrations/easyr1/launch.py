"""The command: EasyR1's own `main`, with ROMA's classes where it takes its own.

    python -m roma.integrations.easyr1 config=CONFIG.yaml algorithm.kl_coef=0 roma.lambda_inv=1

Arguments that begin with `roma.` are `RomaOptions`, over those of the variable ROMA_OPTIONS; all
others are EasyR1's. With roma.num_views=0 EasyR1 runs as it is.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from roma.integrations.easyr1.driver import CorrectnessTrainer
from roma.integrations.easyr1.seams import COMMIT, REWARD, TRAINER, check_class, easyr1
from roma.integrations.options import RomaOptions
from roma_kernels.errors import fail

_MARK = "roma."
_TAKEN = ("FSDPWorker", "RayPPOTrainer", "AutoRewardManager", "Runner", "main")


def main(arguments: Sequence[str]) -> int:
    """Runs EasyR1 with ROMA; returns 0.

    Raises:
        ValueError: an option does not fit, or EasyR1 is not the one that was read.
        ImportError: EasyR1 is not installed.
    """
    options, rest = options_of(arguments)
    module = easyr1("trainer.main")
    stock, argv = getattr(module, "Runner", None), sys.argv
    if options.active:
        check_main(module)
        import ray

        # The configuration is built inside of main, so the options come by the runner.
        runner = ray.remote(num_cpus=1)(Runner)
        module.Runner = SimpleNamespace(remote=functools.partial(runner.remote, options))
    sys.argv = [argv[0], *rest]  # where EasyR1 reads its own
    try:
        module.main()
    finally:
        module.Runner, sys.argv = stock, argv
    return 0


def options_of(arguments: Sequence[str]) -> tuple[RomaOptions, list[str]]:
    """ROMA's options, and the arguments that are EasyR1's.

    Raises:
        ValueError: an unknown name, or a value that does not fit.

    Example:
        >>> options_of(["config=a.yaml", "roma.num_views=4"])[1]
        ['config=a.yaml']
    """
    ours = [argument for argument in arguments if argument.startswith(_MARK)]
    options = RomaOptions.from_env()
    for argument in ours:
        name, _, _ = argument.removeprefix(_MARK).partition("=")
        given = RomaOptions.parse(argument.removeprefix(_MARK))
        options = replace(options, **{name: getattr(given, name)})
    return options, [argument for argument in arguments if argument not in ours]


def check_main(module: Any) -> None:
    """Holds EasyR1's trainer.main to the names that are replaced or called.

    Raises:
        ValueError: one is missing, or has other parameters.
    """
    for name in _TAKEN:
        if not hasattr(module, name):
            remedy = f"use EasyR1 at {COMMIT}, which was read"
            fail("EasyR1's trainer.main", f"the name {name}", "none", remedy)
    check_class(module.RayPPOTrainer, TRAINER)
    check_class(module.AutoRewardManager, REWARD)


class Runner:
    """EasyR1's runner, in a process of its own, where it finds ROMA's worker and trainer."""

    def __init__(self, options: RomaOptions) -> None:
        self.options = options

    def run(self, config: Any) -> None:
        """EasyR1's `Runner.run`.

        Args:
            config: its PPOConfig; the options travel to the workers on it.
        """
        from roma.integrations.easyr1.worker import RomaWorker

        module = easyr1("trainer.main")
        stock = module.RayPPOTrainer
        config.worker.actor.roma_options = self.options
        module.FSDPWorker = RomaWorker
        module.RayPPOTrainer = type("RomaTrainer", (CorrectnessTrainer, stock), {})
        module.Runner.__ray_actor_class__.run(self, config)
