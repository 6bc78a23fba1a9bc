"""`RomaGRPOTrainer` with ROMA off, as the classes that a test finds under TRL's names.

At a module's level, since a checkpoint pickles its config.
"""

from dataclasses import dataclass

from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer


@dataclass
class QuietConfig(RomaGRPOConfig):
    """No views unless a test asks for some."""

    num_views: int = 0


class QuietTrainer(RomaGRPOTrainer):
    """Ours; a test may leave the config out, and then it is the quiet one."""

    def __init__(self, *args, **kwargs):
        if kwargs.get("args") is None:
            kwargs["args"] = QuietConfig(output_dir="quiet", report_to="none")
        super().__init__(*args, **kwargs)
