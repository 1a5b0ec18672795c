"""Offline evaluation: `guiderail rewards evaluate`, `evaluate curve` and `evaluate partial-correlation`."""
