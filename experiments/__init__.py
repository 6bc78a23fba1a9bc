"""What the figures in README and docs come from; not part of the installed package."""
