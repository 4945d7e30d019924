"""Tables, figures and statistical tests from run folders. Nothing here imports torch."""
