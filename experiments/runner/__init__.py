"""Runs of an experiment: arms, the warm start before them, jobs in processes of one thread."""
