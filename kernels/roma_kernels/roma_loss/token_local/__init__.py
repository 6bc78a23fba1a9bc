"""The loss whose gradients are formed while the logits of a chunk are in memory."""
