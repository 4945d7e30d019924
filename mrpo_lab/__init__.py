"""Multi-reference preference optimisation of language models."""
