"""The demo: training and evaluation on real digits, about ten minutes on two CPU cores."""
