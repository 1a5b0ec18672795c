"""Policies that are mixed token by token inside vLLM's engine (guide logit_mix)."""
