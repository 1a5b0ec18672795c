"""The error raised for a load test that cannot be run as asked."""

from guiderail.guides.core.errors import GuiderailError


class LoadtestError(GuiderailError):
    """A flag, a file or the server makes the load test impossible. The message says which."""
