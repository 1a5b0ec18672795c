"""Other servers of models over HTTP: their addresses and keys, and requests to them.

Knows neither policies nor rewards: engines/remote_policy.py and rewards/models/remote_reward.py are built on it.
"""
