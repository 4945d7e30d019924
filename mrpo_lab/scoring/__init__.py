"""The forward pass: log-probabilities of replies under a causal language model."""
