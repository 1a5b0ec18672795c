"""Waiting for what happens elsewhere in the event loop."""

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    """Returns when the condition holds. Raises TimeoutError if it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
