"""Models that score answers: loaded here or run by other servers, scored in batches. They know nothing of requests."""
