"""ROMA as an engine of verl's: its trainer, its loss, and two terms more in each micro-batch.

    ROMA_OPTIONS="num_views=2,lambda_inv=1" python -m roma.integrations.verl …   what main_ppo takes

    __main__     the launcher: the environment of every worker, a check, then verl's own main
    plugin       registers the engine; verl imports it in every process
    engine       `RomaEngine`: one forward of clean and view rows where verl has one of clean rows
    micro_batch  what it reads from verl's micro-batches, and how it adds rows to one
    objective    the trainer's own clip range and averages, for the auxiliary loss

docs/VERL.md has the set-up. This module imports nothing of verl until `check` is called.
"""

from roma.integrations.options import RomaOptions
from roma_kernels.errors import fail

VENDOR = "roma"
PLUGIN = "roma.integrations.verl.plugin"


def check() -> RomaOptions:
    """Refuses a process in which verl would train with another engine than `RomaEngine`.

    verl hides a plug-in that does not load and takes its own engine instead, so that a run would
    train without ROMA and say nothing. `python -m roma.integrations.verl` calls this before verl
    starts; call it yourself from a launcher of your own.

    Returns:
        The options, from ROMA_OPTIONS.

    Raises:
        ValueError: verl resolves to another engine, or ROMA_OPTIONS does not fit; the message says
            what was found and what to set.
        ImportError: verl is not installed.
    """
    from roma.integrations.guard import require

    options = RomaOptions.from_env()
    registry = require("verl.workers.engine.base", "roma-vlm[verl]").EngineRegistry
    from roma.integrations.verl.engine import RomaEngine

    for backend in ("fsdp", "fsdp2"):
        found = registry.get_engine_cls("language_model", backend)
        if found is not RomaEngine:
            got = f"{found.__module__}.{found.__qualname__}"
            remedy = f"set VERL_ENGINE_VENDOR={VENDOR} and VERL_USE_EXTERNAL_MODULES={PLUGIN}"
            fail(f"verl's engine for {backend}", "roma's RomaEngine", got, remedy)
    return options
