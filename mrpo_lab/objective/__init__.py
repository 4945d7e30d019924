"""Losses and weightings: pure functions of tensors that import no model and read no file."""
