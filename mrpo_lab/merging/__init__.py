"""Trade-offs between aspects from merged adapters, to compare with a lambda-conditioned policy."""
