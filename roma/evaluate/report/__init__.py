"""Reports of evaluations: one page for one or several models over one or several benchmarks."""
