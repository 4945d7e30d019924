"""Where a run happens: profiles for ``accelerate launch``."""
