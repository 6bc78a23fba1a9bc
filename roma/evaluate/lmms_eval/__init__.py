"""roma in lmms-eval: any of its tasks on degraded images, and the paper's table from seven of them.

Importing this imports neither lmms-eval nor torch.
"""
