"""The server without HTTP, for commands and scripts: engine and rewards as `guiderail serve` loads them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvloop

from guiderail.server.announce import say
from guiderail.server.ending import Ending
from guiderail.server.runtime import running
from guiderail.server.settings import Settings
from guiderail.server.state import ServerState


@asynccontextmanager
async def offline(settings: Settings, *, engine: bool = True) -> AsyncIterator[ServerState]:
    """State with engine and rewards ready; they and their processes end with the block.

    SIGTERM and Ctrl-C cancel the task that entered it; during the start they end the process with status
    130. With `engine=False` no engine is started, and using it raises EngineNeeded. Must be used on the main
    thread. Rewards have no time limit, as no request waits. Raises GuiderailError if something does not start.
    """
    stop = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    async def cancel() -> None:
        await stop.wait()
        task.cancel()

    with Ending(stop) as ending:
        async with running(settings, ending, engine=engine) as state:
            state.scorer.timeout_s = None
            watch = asyncio.create_task(cancel())
            try:
                yield state
            finally:
                watch.cancel()


def run_offline(settings: Settings, main: Callable[[ServerState], Awaitable[int]], *, engine: bool = True) -> int:
    """Run a command over an offline server; return its exit status, or 130 if a signal stopped it.

    Raises what `main` raises, and GuiderailError if the server does not start.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)

    async def run() -> int:
        try:
            async with offline(settings, engine=engine) as state:
                return await main(state)
        except asyncio.CancelledError:
            say("stopped")
            return 130

    return uvloop.run(run())
