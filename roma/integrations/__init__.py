"""ROMA inside trainers that people already run; each sub-package needs the trainer that it is for.

    trl      RomaGRPOTrainer, RomaGRPOConfig: in the place of TRL's             docs/TRL.md
    swift    a plug-in file for `swift rlhf --external_plugins`                 docs/SWIFT.md
    verl     an engine of verl's, by its plug-in entry point                    docs/VERL.md
    easyr1   an actor of EasyR1's                                               docs/EASYR1.md
    rows     for a trainer whose loss takes one forward's log-probs             docs/ROWS.md
    lm_head  `patch_lm_head`: `roma.linear_logprob` as any model's head         docs/HEADS.md

What they share: `options`, what a user sets; `pixels` and `views`, degraded inputs from the clean
ones, at model resolution; `terms`, the two terms of the loss that look at views. They use public
names of `roma` and `roma.views` alone, so that each works with the transformers its trainer pins.
"""

from typing import TYPE_CHECKING, Any

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way

if TYPE_CHECKING:
    from roma.integrations.lm_head import patch_lm_head

__all__ = ["patch_lm_head"]


def __getattr__(name: str) -> Any:
    """Imports `patch_lm_head` when it is first used."""
    if name != "patch_lm_head":
        raise AttributeError(f"module 'roma.integrations' has no attribute {name!r}")
    from roma.integrations.lm_head import patch_lm_head

    return patch_lm_head
