"""Hidden states of K+1 images of a rollout → the ROMA loss and its gradients."""
