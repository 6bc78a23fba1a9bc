"""A fused loss for reinforcement-learning vision-language models that keep reasoning on bad images.

    out = roma.roma_loss(hidden, view_hidden, head.weight, tokens, mask=..., advantages=...,
                         correct=...)
    out.loss.backward()

The names below need torch alone and are imported when they are first used, so that the command line
answers at once. Views (`roma.views`), models, data, trainer and evaluation load what they need when
they are imported by name; `roma info` shows what is installed and which back end runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma_kernels import __version__
    from roma_kernels.linear_logprob.api import TokenLogprobs, linear_logprob
    from roma_kernels.roma_loss.api import (
        RomaLoss,
        roma_loss,
        roma_loss_from_logp,
        view_divergence,
    )
    from roma_kernels.roma_loss.batch import METRICS
    from roma_kernels.roma_loss.config import RomaConfig

__all__ = [
    "METRICS",
    "RomaConfig",
    "RomaLoss",
    "TokenLogprobs",
    "__version__",
    "linear_logprob",
    "roma_loss",
    "roma_loss_from_logp",
    "view_divergence",
]

_HOME = {
    "METRICS": "roma_kernels.roma_loss.batch",
    "RomaConfig": "roma_kernels.roma_loss.config",
    "RomaLoss": "roma_kernels.roma_loss.api",
    "TokenLogprobs": "roma_kernels.linear_logprob.api",
    "__version__": "roma_kernels",
    "linear_logprob": "roma_kernels.linear_logprob.api",
    "roma_loss": "roma_kernels.roma_loss.api",
    "roma_loss_from_logp": "roma_kernels.roma_loss.api",
    "view_divergence": "roma_kernels.roma_loss.api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, and keeps it."""
    if name not in _HOME:
        raise AttributeError(f"module 'roma' has no attribute {name!r}{_hint(name)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _hint(name: str) -> str:
    """For who expects the other `roma`: that it is installed too."""
    from importlib.util import find_spec

    # Python asks for names of its own, and for sub-packages before it imports them.
    if name.startswith("_") or find_spec(f"roma.{name}"):
        return ""
    from roma.namesake import conflict

    found = conflict()
    return f"; {found}" if found else ""


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
