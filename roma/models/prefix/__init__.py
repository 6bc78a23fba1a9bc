"""A prompt once for all its rollouts: packed groups, and the attention that keeps them apart.

`examples/shared_update.py` is a whole update with them, in PyTorch and transformers alone.
"""

from roma.models.prefix.attention import ATTENTION, share_prompts, shares_prompts
from roma.models.prefix.groups import Group, Packed, pack

__all__ = ["ATTENTION", "Group", "Packed", "pack", "share_prompts", "shares_prompts"]
