"""What verl imports in each of its processes: registers `RomaEngine`, or ends the process.

verl comes here by the entry point `roma` of its group `verl.plugins`, or because
VERL_USE_EXTERNAL_MODULES names this module. Without VERL_ENGINE_VENDOR=roma nothing is loaded. With
it an engine that cannot be registered ends the process: verl takes the exceptions of its entry
points for a line at level DEBUG, and would train on without ROMA.
"""

import os
import sys
from typing import NoReturn

_FAILURES = (
    ImportError,
    AttributeError,
    AssertionError,
    TypeError,
    ValueError,
    RuntimeError,
    OSError,
)


def load() -> None:
    """Registers the engine.

    Raises:
        SystemExit: it could not be registered; the reason is on stderr too, where Ray shows it.
    """
    try:
        from roma.integrations.verl.engine import register

        register()
    except _FAILURES as error:
        _stop(error)


def _stop(error: BaseException) -> NoReturn:
    said = f"roma: VERL_ENGINE_VENDOR=roma, but its engine did not load: {error}"
    remedy = "mend it, or unset VERL_ENGINE_VENDOR to train without ROMA"
    print(f"{said}; {remedy}", file=sys.stderr, flush=True)
    raise SystemExit(f"{said}; {remedy}") from error


if os.environ.get("VERL_ENGINE_VENDOR") == "roma":
    load()
