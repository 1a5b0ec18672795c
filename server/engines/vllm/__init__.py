"""vLLM in processes of our own: the only package that imports it. Knows nothing of requests, guides and rewards."""
