"""Engines: adapters from a language-model runtime to guiderail.guides.Engine."""
