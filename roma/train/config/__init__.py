"""The trainer's configuration: YAML sections data, algorithm, worker, trainer, and `a.b=c` on top.

`sections` has every key with what it means, `check_*` what does not go together.
"""

from roma.train.config.load import (
    Config,
    changed_options,
    dump,
    from_dict,
    load_config,
    to_dict,
)

__all__ = ["Config", "changed_options", "dump", "from_dict", "load_config", "to_dict"]
