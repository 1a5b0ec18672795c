"""Reward models: loading, batched scoring on this machine or another. Knows nothing of requests."""
