"""What `roma train` does with its arguments; `roma.cli` has these."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roma_kernels.errors import fail

_PLAN = ("ranks", "tflops", "gpu_gib", "prompt_tokens", "image_tokens", "response_tokens", "right")
"""Arguments of --dry-run, named as in `roma.train.estimate.Assumed`."""


def run(options: argparse.Namespace, configs: Sequence[Path]) -> None:
    """Trains, or prints what is asked for.

    Args:
        options: of the command line.
        configs: the example configurations that are installed.

    Raises:
        ValueError: an argument of --dry-run without it or out of range, or what `load_config` and
            `train` refuse.
    """
    _check_plan(options)
    if options.list_configs:
        print("\n".join(map(str, configs)))
    elif options.list_metrics:
        from roma.train.metrics import LOGGED

        for name, meaning in LOGGED.items():
            print(f"{name}\n    {meaning}")
    elif options.list_keys:
        from roma.train.config import Config
        from roma.train.config.schema import explain

        for entry in explain(Config):
            print(f"{entry.key} = {entry.default}    ({entry.kind})\n    {entry.meaning}")
    else:
        _with_config(options)


def _with_config(options: argparse.Namespace) -> None:
    from roma.train.config import dump, load_config

    path, *overrides = options.config or [None]
    if path is not None and "=" in path and not Path(path).exists():
        path, overrides = None, options.config
    config = load_config(path, overrides)
    if options.print_config:
        print(dump(config), end="")
    elif options.dry_run:
        from roma.train.estimate import Assumed, estimate, page

        given = {name: value for name, value in _plan(options).items() if value is not None}
        print(dump(config))
        print(page(config, estimate(config, Assumed(**given))), end="")
    else:
        from roma.train.trainer import train

        train(config)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _PLAN}


def _check_plan(options: argparse.Namespace) -> None:
    for name, value in _plan(options).items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if not options.dry_run:
            fail(flag, "--dry-run beside it", "none", "add it; a run itself measures")
        if name == "right" and not 0 <= value <= 1:
            fail(flag, "a share, 0 to 1", f"{value:g}", "correct it")
        if value < 0 or (value == 0 and name not in ("image_tokens", "right")):
            fail(flag, "a number > 0", f"{value:g}", "correct it")
    prompt, images = options.prompt_tokens, options.image_tokens
    if prompt is not None and images is not None and images >= prompt:
        remedy = "a question is more than its images"
        fail("--image-tokens", f"fewer than --prompt-tokens = {prompt}", str(images), remedy)
