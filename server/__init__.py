"""Guiderail's server: OpenAI-compatible HTTP in front of guides, rewards and the engine."""
