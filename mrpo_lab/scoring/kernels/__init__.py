"""Faster forms of layers that compute the same numbers."""
