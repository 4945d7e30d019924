"""The study's tables, figures and tests from run folders. Nothing here imports torch."""
