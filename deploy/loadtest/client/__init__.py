"""What a client does: sends one request and times what comes back. Knows nothing of loads and reports."""
