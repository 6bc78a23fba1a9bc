"""Accuracy on clean and degraded images: conditions, answers, intervals, tables, figures."""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
