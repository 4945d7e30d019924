"""What training and scoring would cost on a GPU, computed without one."""
