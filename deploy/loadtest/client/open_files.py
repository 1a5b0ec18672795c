"""The limit of open files, which a connection counts against: raised for a load, or said before it is sent."""

import resource
from contextlib import suppress

from guiderail.loadtest.load.runner import Load
from guiderail.loadtest.load.sweep import Sweep
from guiderail.loadtest.loadtest_error import LoadtestError

PLENTY = 65_536  # where there is no hard limit
OTHERS = 64  # open files of the process itself, and connections that are about to close


def allow(load: Load, sweep: Sweep | None) -> None:
    """Raise this process's soft limit, within the hard one, to what the load may need.

    Raises LoadtestError if the load is sure to need more than the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at_once = _sure(load, sweep)
    if resource.RLIM_INFINITY not in (soft, hard) and at_once + OTHERS > hard:
        raise LoadtestError(
            f"{at_once} requests at once need {at_once + OTHERS} open files, and this process may have {hard} "
            "(ulimit -Hn): raise that limit, or give a smaller --max-concurrency"
        )
    wanted = max(at_once + OTHERS, PLENTY) if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and wanted > soft:
        with suppress(OSError, ValueError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _sure(load: Load, sweep: Sweep | None) -> int:
    """Requests that are certain to be in flight together, if the server takes its time."""
    if sweep is not None:
        return 0 if sweep.rates is not None else min(sweep.users, load.count or sweep.users)
    if load.closed and load.max_concurrency is not None:
        return min(load.max_concurrency, load.count or load.max_concurrency)
    return (load.count or 0) if load.offered_rps is None else 0  # at a rate it depends on the server
