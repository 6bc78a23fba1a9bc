"""Engines that sample completions: transformers' `generate` (`roma.rollout.hf`)."""
