"""Compiles what launches, for every chip, without a GPU: `make kernels`, `make kernels-all`."""
