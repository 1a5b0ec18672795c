"""The load: which requests are sent, and when. Knows nothing of HTTP and of reports."""
