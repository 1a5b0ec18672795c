"""The scripted server as a fixture."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))

from scripted_server import Scripted


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Scripted]:
    """A scripted server on a free port."""
    async with Scripted().running() as running:
        yield running
