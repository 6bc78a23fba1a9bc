"""Hidden states × head weight → log-probability, lse and entropy of each token."""
