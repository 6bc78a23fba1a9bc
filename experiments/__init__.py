"""Experiments behind the figures in README.md and docs/; not part of the installed packages."""
