"""Evaluation of rewards and of best-of-N, offline: `guiderail rewards evaluate` and `guiderail evaluate curve`."""
