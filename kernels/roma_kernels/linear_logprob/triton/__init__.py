"""The kernels that Triton compiles: products with the head, and rows in and out of them."""
