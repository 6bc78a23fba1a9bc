"""roma_loss whose gradients are formed while a chunk's logits are at hand."""
