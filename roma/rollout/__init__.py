"""Engines that sample completions.

The protocol (`base`), transformers' `generate` (`hf`), vLLM in this process (`vllm`), the choice
between them (`engines`), and the weight that takes back what their log-probs differ by
(`correction`).
"""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.rollout.correction import rollout_weight
from roma.rollout.engines import make_sampler

__all__ = ["make_sampler", "rollout_weight"]
