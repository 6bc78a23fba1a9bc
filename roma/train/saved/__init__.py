"""What a run folder holds: manifests, the newest and the best checkpoint, whose model it is.

`roma.train.checkpoint` saves and restores with it.
"""
