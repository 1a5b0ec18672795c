"""Scores for all requests: the batcher and calibration. Knows nothing of HTTP."""
