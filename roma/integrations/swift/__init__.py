"""ROMA inside ms-swift's GRPO, as a plug-in of `swift rlhf`.

    swift rlhf --rlhf_type grpo --external_plugins "$(python -m roma.integrations.swift)" …

The options are in the environment variable ROMA_OPTIONS (`roma.integrations.options`). All of it:
docs/SWIFT.md. Importing this imports no swift.
"""

from pathlib import Path
from typing import Literal

from roma.integrations.options import RomaOptions

TRAINER = "roma.integrations.swift.trainer.RomaGRPOTrainer"

__all__ = ["plugin_path", "register"]


def plugin_path() -> Path:
    """The file for `--external_plugins`, which `python -m roma.integrations.swift` prints.

    Example:
        >>> plugin_path().name
        'plugin.py'
    """
    return Path(__file__).with_name("plugin.py")


def register(
    options: RomaOptions | None = None,
    *,
    accuracy_reward: str | int | None = None,
    lm_head: Literal["roma", "swift"] | None = None,
) -> None:
    """Puts `RomaGRPOTrainer` in the place of swift's own for `--rlhf_type grpo`.

    For a program that calls `swift.rlhf_main`; the plug-in file does the same for the command. With
    options that are not active swift's own code runs, bit for bit.

    Args:
        options: None: from the environment variable ROMA_OPTIONS.
        accuracy_reward: the reward that says whether an answer is right: its name, or its place
            among --reward_funcs; None: from the variable ROMA_ACCURACY_REWARD, else the first.
        lm_head: what turns hidden states into log-probs: `roma.linear_logprob`, whose logits are
            fp32, or swift's own code, whose logits have the model's type; None: from the variable
            ROMA_LM_HEAD, else "roma".

    Raises:
        ImportError: swift is not installed.
        ValueError: an option, swift's version or a signature does not fit.
    """
    from roma.integrations.swift.checks import check_swift

    check_swift()
    from swift.trainers import TrainerFactory

    from roma.integrations.swift.trainer import RomaGRPOTrainer

    RomaGRPOTrainer.configure(options, accuracy_reward, lm_head)
    TrainerFactory.TRAINER_MAPPING["grpo"] = TRAINER
