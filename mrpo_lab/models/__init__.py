"""Checkpoints: loading them, the policy that is trained, the references it is compared with."""
