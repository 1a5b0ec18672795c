"""Engines: adapters from language-model runtimes to guiderail.guides.Engine.

They turn prompts into sequences of deltas and never call back up: they know neither guides, requests nor rewards.
"""
