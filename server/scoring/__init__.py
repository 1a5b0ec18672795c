"""What all requests share for scores: the batcher and calibration. Knows nothing of HTTP."""
