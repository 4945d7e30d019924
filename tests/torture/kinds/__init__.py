"""One module for each kind of trial."""
