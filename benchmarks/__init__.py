"""Benchmarks of speed and memory, beside other programs on the same work. See README.md."""
