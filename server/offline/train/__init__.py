"""Training of scalar reward heads from preference pairs: `guiderail rewards train`."""
