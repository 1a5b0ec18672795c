"""Policies mixed token by token inside vLLM's engine (guide logit_mix): one sequence per policy, in lockstep.

Knows what the guide asks for only as a TokenPrompt with others mixed into it.
"""
