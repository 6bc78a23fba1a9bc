"""Accuracy on clean and degraded images: conditions, answers, intervals, tables, figures."""
