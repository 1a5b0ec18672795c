"""The HTTP client: one request, and the timing of its answer. Knows nothing of loads and reports."""
