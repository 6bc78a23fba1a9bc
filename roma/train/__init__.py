"""The trainer: collect, update, log, save. `roma.train.trainer` is read from top to bottom."""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
