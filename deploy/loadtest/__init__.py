"""Load tests of OpenAI-compatible servers: `guiderail loadtest`. Knows the server by its HTTP interface alone.

The way of a run: `flags` -> `client/session` makes a `load/plan` (which request comes next) -> `load/runner` keeps the
schedule -> `client/http` sends and times each request into a `Record` -> `report/metrics_of_a_run` sums up ->
`report/result`, `table` and `page` show it.
"""
