"""Patterns and schemas that clients write: limits on their size, and processes with limits that work with them."""
