"""The kernels of the loss from log-probs, compiled by Triton."""
