"""Remote reward servers, against a scripted one: what is sent, what comes back, and every way to fail."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from scripted_pooling import NO_SERVICES, ScriptedPooling, drop, group, logits, pooler, served
from tiny_reward import tiny_head, tiny_tokenizer
from waiting import until

from guiderail.guides.core.errors import RewardFailed
from guiderail.server.metrics import Metrics
from guiderail.server.rewards.models import remote_reward as remote
from guiderail.server.scoring.batcher import BatchingScorer


@pytest.fixture
async def server() -> AsyncIterator[ScriptedPooling]:
    async with ScriptedPooling() as made:
        yield made


class TestScoring:
    async def test_one_request_with_token_ids_and_the_raw_option(self, server: ScriptedPooling) -> None:
        sequences = [[1, 2], [7] * 40, [5]]
        async with pooler(server) as backend:
            assert await backend.score(sequences) == [logits(tokens, 2) for tokens in sequences]  # sent back reversed
            assert (backend.heads, backend.longest, backend.stats.tokens_asked) == (2, 96, 43)
        (body,) = server.seen
        assert body == {
            "model": "rm", "task": "classify", "input": sequences, "use_activation": False, "encoding_format": "float",
        }  # fmt: skip

    async def test_large_calls_go_in_chunks_and_in_order(
        self, server: ScriptedPooling, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "CHUNK", 4)
        sequences = [[n] for n in range(1, 12)]
        async with pooler(server) as backend:
            assert await backend.score(sequences) == [logits(tokens, 2) for tokens in sequences]
        assert sorted(len(body["input"]) for body in server.seen) == [3, 4, 4]

    async def test_requests_in_flight_are_bounded(
        self, server: ScriptedPooling, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "IN_FLIGHT", 3)

        async def slow(request: web.Request) -> None:
            await asyncio.sleep(0.02)

        async with pooler(server) as backend:
            server.fault = slow
            await asyncio.gather(*(backend.score([[n]]) for n in range(1, 13)))
        assert server.peak == 3
        assert len(server.seen) == 12

    async def test_calls_go_out_while_others_are_in_flight(self, server: ScriptedPooling, tmp_path: Path) -> None:
        """Through the Scorer: a call that hangs does not keep the next one waiting."""
        reward = served(tiny_head(tmp_path), url=server.url)
        await reward.start(NO_SERVICES)
        hang = asyncio.Event()

        async def first_hangs(request: web.Request) -> None:
            if server.running == 1 and not hang.is_set():
                await hang.wait()

        server.fault = first_hangs
        scorer = BatchingScorer({"r": reward}, Metrics("fake"))
        slow = asyncio.create_task(scorer.score("r", group("w3")))
        while not server.running:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(5):
            quick = await scorer.score("r", group("w4"))
        assert not slow.done()
        hang.set()
        assert (await slow).values != quick.values
        await reward.close()


class TestFaults:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("", "cannot be used"),
            ("<html>", "cannot be used"),
            ("[]", "cannot be used"),
            ('{"data": [{"index": 0, "data": [NaN, 1]}]}', "cannot be used"),
            ('{"data": [{"index": 0, "data": [null, 1]}]}', "cannot be used"),
            ('{"data": [{"index": 0, "data": [1e999, 1]}]}', "cannot be used"),
            ('{"data": [{"index": 0, "data": ["1", 1]}]}', "cannot be used"),
            ('{"data": [{"index": 0, "data": [[1, 2]]}]}', "cannot be used"),
            ('{"data": [{"index": 0, "data": []}]}', "cannot be used"),
            ('{"data": []}', "0 sequences of 1"),
            ('{"data": [{"index": 1, "data": [1, 2]}]}', "1 sequences of 1, or others"),
            ('{"data": [{"index": 0, "data": [1, 2]}, {"index": 0, "data": [1, 2]}]}', "2 sequences of 1"),
            ('{"data": [{"index": 0, "data": [1, 2, 3]}]}', "gave 3 values a sequence where the model has 2 heads"),
        ],
    )
    async def test_answers_that_are_none(self, body: str, message: str, server: ScriptedPooling) -> None:
        async def fault(request: web.Request) -> web.Response:
            return web.Response(text=body, content_type="application/json")

        async with pooler(server) as backend:
            server.fault = fault
            with pytest.raises(RuntimeError, match=message):
                await backend.score([[1]])
            assert len(server.seen) == 1

    @pytest.mark.parametrize("status", [302, 400, 401, 429, 500, 503])
    async def test_statuses_are_errors_and_not_tried_again(
        self, status: int, server: ScriptedPooling, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fault(request: web.Request) -> web.Response:
            return web.json_response({"error": {"message": "some reason"}}, status=status, headers={"Location": "/"})

        async with pooler(server) as backend:
            server.fault = fault
            with pytest.raises(
                RuntimeError, match=f"the remote server answered /pooling with status {status}"
            ) as error:
                await backend.score([[1]])
        assert len(server.seen) == 1
        assert f"{server.url} answered" in caplog.text, "the operator learns which server and why"
        assert "some reason" in caplog.text
        assert server.url not in str(error.value), "the client does not"

    @pytest.mark.parametrize("drops", [1, 2, 3])
    async def test_a_lost_connection_is_tried_twice_more(self, drops: int, server: ScriptedPooling) -> None:
        async def fault(request: web.Request) -> None:
            if len(server.seen) <= drops:
                await drop(request)

        async with pooler(server) as backend:
            server.fault = fault
            if drops < 3:
                assert await backend.score([[5]]) == [logits([5], 2)]
            else:
                with pytest.raises(RuntimeError, match="the remote server cannot be reached"):
                    await backend.score([[5]])
        assert len(server.seen) == min(drops + 1, 3)

    async def test_another_server_stands_in_for_one_that_is_gone(self) -> None:
        async with ScriptedPooling() as one, ScriptedPooling() as two, pooler(one, two) as backend:
            await one.__aexit__()
            for n in range(1, 7):
                assert await backend.score([[n] * 40]) == [logits([n] * 40, 2)]
            assert len(two.seen) == 6

    async def test_a_response_that_breaks_off_is_not_tried_again(self, server: ScriptedPooling) -> None:
        async def fault(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b'{"data"')
            await drop(request)
            return response

        async with pooler(server) as backend:
            server.fault = fault
            with pytest.raises(RuntimeError, match="broke off"):
                await backend.score([[5]])
        assert len(server.seen) == 1

    async def test_silence_is_an_error_after_a_time(
        self, server: ScriptedPooling, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "READ_S", 0.1)
        async with pooler(server) as backend:
            server.fault = lambda request: asyncio.sleep(3600)
            with pytest.raises(RuntimeError, match=r"sent nothing for 0\.1 s"):
                await backend.score([[5]])
        assert len(server.seen) == 1

    async def test_cancelling_frees_the_server(self, server: ScriptedPooling) -> None:
        async with pooler(server) as backend:
            server.fault = lambda request: asyncio.sleep(3600)
            task = asyncio.create_task(backend.score([[5] * 40]))
            while not server.running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server.given_up == 1, 5)
            assert set(backend._router._load.values()) == {0}
            server.fault = None
            assert await backend.score([[5]]) == [logits([5], 2)]

    async def test_a_failure_fails_the_requests_that_use_it(self, server: ScriptedPooling, tmp_path: Path) -> None:
        reward = served(tiny_head(tmp_path), url=server.url)
        await reward.start(NO_SERVICES)
        bad = tiny_tokenizer()("w9")["input_ids"][0]

        async def fault(request: web.Request) -> web.Response | None:
            sequences = (await request.json())["input"]
            return web.Response(status=500) if any(bad in tokens for tokens in sequences) else None

        server.fault = fault
        scorer = BatchingScorer({"good": reward}, Metrics("fake"))
        results = await asyncio.gather(
            *(scorer.score("good", group(text)) for text in ("w3", "w9", "w4")), return_exceptions=True
        )
        assert isinstance(results[1], RewardFailed)
        assert "reward 'good' failed: RuntimeError: the remote server answered" in str(results[1])
        assert not any(isinstance(result, Exception) for result in (results[0], results[2]))
        await reward.close()
