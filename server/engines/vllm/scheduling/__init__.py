"""Scheduling of sequences in vLLM's core process: groups of mixtures start whole, and steps stay short for plain chats.

Each policy is a class of its own that decides on a SchedulerState; scheduler.py joins them to vLLM's scheduler.
"""
