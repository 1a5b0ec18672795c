"""The supervised engine: it comes back, also when the first tries fail, and says that it is down meanwhile."""

import asyncio
from typing import Any

import pytest
from fakes import ScriptedEngine
from virtual_time import in_virtual_time

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


class Mute(Mortal):
    """Answers when it is let go. asked: the questions that wait for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.asked = self.waiting = 0

    async def answer(self) -> None:
        self.asked += 1
        self.waiting += 1
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1


@in_virtual_time
async def test_an_engine_that_does_not_answer_is_up_and_said_not_to_answer(caplog: pytest.LogCaptureFixture) -> None:
    inner = Mute()
    inner.go.set()

    async def build() -> Any:
        return inner

    engine = SupervisedEngine(build, silent_s=15)
    assert not engine.answers
    await engine.start()
    await asyncio.sleep(100)
    assert engine.answers
    assert inner.asked > 10
    inner.go.clear()
    await asyncio.sleep(14)
    assert engine.answers, "it is asked every 5 s, and has 15 s to answer"
    await asyncio.sleep(7)
    assert engine.up
    assert not engine.answers
    assert inner.waiting == 1, "one question at a time"
    async with engine.generate([TokenPrompt((1,))], SamplingSpec(9)) as rollouts:
        assert [delta.text async for delta in rollouts], "it may yet answer"
    await asyncio.sleep(1000)
    assert inner.waiting == 1
    inner.go.set()
    await asyncio.sleep(0.01)
    assert engine.answers
    assert caplog.messages.count("the engine has not answered for 15 s") == 1
    assert any(message.startswith("the engine answers again") for message in caplog.messages)
    await engine.close()


@in_virtual_time
async def test_a_new_engine_answers_for_itself() -> None:
    built: list[Mute] = []

    async def build() -> Any:
        built.append(Mute())
        if len(built) > 1:
            built[-1].go.set()
        return built[-1]

    engine = SupervisedEngine(build, silent_s=15)
    await engine.start()
    await asyncio.sleep(20)
    assert not engine.answers
    built[0].up = False
    await asyncio.sleep(40)
    assert engine.answers
    assert built[0].waiting == 0
    await engine.close()
