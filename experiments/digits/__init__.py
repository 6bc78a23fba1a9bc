"""The demo: the whole method on real digits, two CPU cores, about ten minutes."""
