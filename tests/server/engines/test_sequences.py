"""Sequences of a generation: what ends together is freed in one call, in whatever way it ends, and few run at once."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence

import pytest
from fakes import ScriptedEngine

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.guides.core.types import Delta, SamplingSpec, TokenPrompt
from guiderail.server.engines.sequences import run_to_end

PROMPTS = [TokenPrompt((1,))] * 100


def endless(seed: int) -> list[str]:
    return ["w"] * 10_000


async def test_leaving_frees_all_that_runs_in_one_call() -> None:
    engine = ScriptedEngine(endless, step_s=0.001)
    async with engine.generate(PROMPTS, SamplingSpec(10_000)) as rollouts:
        async for _ in rollouts:
            if engine.num_running() == 100:
                break
    assert [len(call) for call in engine.aborted] == [100]
    assert engine.num_running() == 0


async def test_a_cancelled_reader_frees_all_in_one_call() -> None:
    engine = ScriptedEngine(endless, step_s=0.001)

    async def read() -> None:
        async with engine.generate(PROMPTS, SamplingSpec(10_000)) as rollouts:
            async for _ in rollouts:
                pass

    reader = asyncio.create_task(read())
    while engine.num_running() < 100:
        await asyncio.sleep(0.001)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert [len(call) for call in engine.aborted] == [100]
    assert engine.num_running() == 0


async def test_what_is_dropped_at_once_is_freed_in_one_call() -> None:
    engine = ScriptedEngine(endless, step_s=0.001)
    reasons: dict[int, str | None] = {}
    async with engine.generate(PROMPTS, SamplingSpec(10_000)) as rollouts:
        async for delta in rollouts:
            if engine.num_running() == 100 and not engine.aborted and not reasons:
                for row in range(60):
                    await rollouts.drop(row, "rejected")
                    await rollouts.drop(row, "again")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert [len(call) for call in engine.aborted] == [60]
                for row in range(60, 100):
                    await rollouts.drop(row)
            if delta.finish_reason:
                reasons[delta.row] = delta.finish_reason
    assert [len(call) for call in engine.aborted] == [60, 40]
    assert reasons == {row: "rejected" if row < 60 else "dropped" for row in range(100)}


async def test_a_deadline_frees_all_in_one_call() -> None:
    engine = ScriptedEngine(endless, step_s=0.001)
    loop = asyncio.get_running_loop()
    async with engine.generate(PROMPTS, SamplingSpec(10_000), deadline=loop.time() + 0.2) as rollouts:
        reasons = [delta.finish_reason async for delta in rollouts if delta.finish_reason]
    assert reasons == ["deadline"] * 100
    assert [len(call) for call in engine.aborted] == [100]


class Sequences:
    """Sequences that end when they are let go, each with one delta."""

    def __init__(self, fail: int | None = None, silent: int | None = None) -> None:
        self.fail, self.silent = fail, silent
        self.made = self.running = self.peak = 0
        self.go = asyncio.Event()
        self.freed: list[list[str]] = []

    def make(self, count: int) -> Iterator["One"]:
        for number in range(count):
            self.made += 1
            yield One(self, number)

    async def free(self, ids: Sequence[str]) -> None:
        self.freed.append(list(ids))


class One:
    def __init__(self, group: Sequences, number: int) -> None:
        self.group, self.number = group, number

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        self.group.running += 1
        self.group.peak = max(self.group.peak, self.group.running)
        try:
            await self.group.go.wait()
            await asyncio.sleep(0)
            if self.number == self.group.fail:
                raise EngineUnavailable("lost")
            if self.number != self.group.silent:
                yield Delta(0, str(self.number), (self.number,), "stop")
        finally:
            self.group.running -= 1

    def give_up(self) -> Sequence[str]:
        return [str(self.number)]


async def test_few_of_many_run_at_once_and_later_ones_are_made_when_they_start() -> None:
    group = Sequences()
    work = asyncio.create_task(run_to_end(group.make(5000), 16, group.free))
    for _ in range(5):
        await asyncio.sleep(0)
    assert (group.made, group.running) == (16, 16)
    group.go.set()
    assert [delta.token_ids for delta in await work] == [(number,) for number in range(5000)]
    assert group.peak == 16
    assert not group.freed


async def test_a_cancelled_run_frees_the_few_that_run_in_one_call_and_starts_no_other() -> None:
    group = Sequences()
    work = asyncio.create_task(run_to_end(group.make(5000), 16, group.free))
    for _ in range(5):
        await asyncio.sleep(0)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert [sorted(map(int, call)) for call in group.freed] == [list(range(16))]
    assert (group.made, group.running) == (16, 0)


@pytest.mark.parametrize("fault", [{"fail": 20}, {"silent": 20}])
async def test_a_sequence_that_fails_ends_all(fault: dict[str, int]) -> None:
    group = Sequences(**fault)
    group.go.set()
    with pytest.raises(EngineUnavailable, match=r"lost|returned nothing"):
        await run_to_end(group.make(5000), 16, group.free)
    assert group.running == 0
    assert group.made < 5000
