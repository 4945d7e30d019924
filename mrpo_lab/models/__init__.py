"""Models: loading their weights, the policy that is trained, and its references."""
