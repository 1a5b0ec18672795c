"""Load tests of OpenAI-compatible servers: `guiderail loadtest`. Knows the server by its HTTP interface alone.

A run goes: `flags` -> `session` makes a `plan` (which request, when) -> `runner` keeps the schedule -> `client` sends
and times each request into a `Record` -> `stats` sums up -> `result`, `table` and `report` show it.
"""
