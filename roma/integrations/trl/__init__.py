"""ROMA in TRL: `RomaGRPOTrainer` and `RomaGRPOConfig`, in the place of TRL's (docs/TRL.md).

    from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

TRL 1.15 and 1.16. The clean objective stays TRL's, whatever its loss type; with num_views=0 the
trainer is TRL's, bit for bit.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roma.integrations.trl.config import RomaGRPOConfig
    from roma.integrations.trl.trainer import RomaGRPOTrainer

__all__ = ["RomaGRPOConfig", "RomaGRPOTrainer"]


def __getattr__(name: str) -> Any:
    """Imports TRL when one of the two names is first used, after its version was checked."""
    if name not in __all__:
        raise AttributeError(f"module 'roma.integrations.trl' has no attribute {name!r}")
    from roma.integrations.trl import checks

    checks.check_installed()
    from roma.integrations.trl import config, trainer

    return getattr(config if name == "RomaGRPOConfig" else trainer, name)
