"""The scripted server as a fixture."""

from collections.abc import AsyncIterator

import pytest_asyncio
from timed_server import Scripted


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Scripted]:
    """A scripted server on a free port."""
    async with Scripted().running() as running:
        yield running
