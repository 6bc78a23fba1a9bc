"""Engines that sample completions: the protocol (`base`) and transformers' `generate` (`hf`)."""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
