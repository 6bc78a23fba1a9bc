"""`python -m roma.integrations.verl …`: verl's main_ppo with ROMA, on every worker or not at all.

    ROMA_OPTIONS="num_views=2" python -m roma.integrations.verl data.train_files=… (as main_ppo)

It names the engine and the plug-in in the environment, hands both and the options to Ray's workers
on other machines too, checks that verl resolves to `RomaEngine`, and starts verl.
"""

import os
import sys

from roma.integrations.options import VARIABLE
from roma.integrations.verl import PLUGIN, VENDOR, check

_RUNTIME = "ray_kwargs.ray_init.runtime_env.env_vars"


def environment() -> dict[str, str]:
    """What each process of a run needs, beside what is set already."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    if PLUGIN not in modules:
        modules.append(PLUGIN)
    return {
        "VERL_ENGINE_VENDOR": VENDOR,
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        VARIABLE: os.environ.get(VARIABLE, ""),
    }


def overrides(variables: dict[str, str]) -> list[str]:
    """Hydra's overrides that give Ray's workers these variables."""
    quoted = {
        name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in variables.items()
    }
    return [f"++{_RUNTIME}.{name}='{value}'" for name, value in quoted.items()]


def main() -> None:
    """Sets the environment, checks the engine, and runs verl's trainer with the arguments given.

    Raises:
        SystemExit: an option, or what is installed, does not fit.
    """
    variables = environment()
    os.environ.update(variables)
    try:
        options = check()
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    state = "on" if options.active else "off: verl's own code runs"
    print(f"roma: {state}; {options}", flush=True)
    # Beside the user's own: Hydra takes overrides in one piece.
    given = sys.argv[1:]
    own = [place for place, text in enumerate(given) if "=" in text and not text.startswith("-")]
    first = own[0] if own else len(given)
    sys.argv[1:] = [*given[:first], *overrides(variables), *given[first:]]
    from verl.trainer.main_ppo import main as train

    train()


if __name__ == "__main__":
    main()
