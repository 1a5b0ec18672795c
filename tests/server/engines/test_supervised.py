"""The supervised engine: it comes back, also when the first tries fail, and says that it is down meanwhile."""

import asyncio
from typing import Any

import pytest
from fakes import ScriptedEngine

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.server.engines.supervised import SupervisedEngine


class Mortal(ScriptedEngine):
    closed = False

    async def cause_of_death(self) -> str:
        return "killed by SIGKILL"

    async def close(self) -> None:
        self.closed = True


async def test_it_is_built_again_after_death(caplog: pytest.LogCaptureFixture) -> None:
    built: list[Mortal] = []
    failures = 2
    restarts = 0

    async def build() -> Any:
        nonlocal failures
        if built and failures:
            failures -= 1
            await asyncio.sleep(0.02)
            raise EngineUnavailable("not yet")
        built.append(Mortal())
        return built[-1]

    def restarted() -> None:
        nonlocal restarts
        restarts += 1

    engine = SupervisedEngine(build, on_restart=restarted, poll_s=0.01, backoff_s=0.01)
    with pytest.raises(EngineUnavailable):
        engine.generate([TokenPrompt((1,))], SamplingSpec(1))
    await engine.start()
    assert engine.up
    built[0].up = False
    assert not engine.up
    with pytest.raises(EngineUnavailable):
        engine.generate([TokenPrompt((1,))], SamplingSpec(1))
    reasons = set()
    while not engine.up:
        with pytest.raises(EngineUnavailable) as down:
            engine.generate([TokenPrompt((1,))], SamplingSpec(1))
        reasons.add(str(down.value))
        await asyncio.sleep(0)
    assert {"the engine is down: killed by SIGKILL", "the engine is down: not yet"} <= reasons
    assert "the engine died: killed by SIGKILL; starting it again" in caplog.messages
    assert built[0].closed
    assert (len(built), failures, restarts) == (2, 0, 1)
    async with engine.generate([TokenPrompt((1,))], SamplingSpec(9)) as rollouts:
        texts = [delta.text async for delta in rollouts]
        assert texts[0] == "w0"
    await engine.close()
    assert built[1].closed


async def test_a_first_start_that_fails_is_raised() -> None:
    async def build() -> Any:
        raise EngineUnavailable("no such model")

    with pytest.raises(EngineUnavailable, match="no such model"):
        await SupervisedEngine(build).start()
