"""How fast and how small, beside other programs on the same work. See README.md."""
