"""The only package that imports vLLM. Knows nothing of requests and guides."""
