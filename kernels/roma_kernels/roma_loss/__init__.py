"""K+1 log-probs per token → the loss and one coefficient per (view, token)."""
