"""Connections that their clients leave idle, unfinished or unread end, and take nothing with them.

Limits are those of the flags, made short; what they are compared with is the order of events, never a clock.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fakes import ScriptedEngine, make_state
from raw_http import Raw, exchange, post
from serving import serving
from virtual_time import in_virtual_time
from waiting import until

PATH = "/v1/chat/completions"
BODY = b'{"messages": [{"role": "user", "content": "q"}], "max_tokens": 4}'
STREAM = b'{"messages": [{"role": "user", "content": "q"}], "max_tokens": 100000, "stream": true}'
HEAD = b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(BODY))


@asynccontextmanager
async def dripping(raw: Raw, data: bytes, every_s: float = 1.0) -> AsyncIterator[None]:
    """Sends a byte at a time meanwhile."""

    async def drip() -> None:
        for byte in data:
            await raw.send(bytes([byte]))
            await asyncio.sleep(every_s)

    task = asyncio.create_task(drip())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def now() -> float:
    return asyncio.get_running_loop().time()


class TestHeaders:
    @in_virtual_time
    async def test_a_connection_that_says_nothing_is_closed(self) -> None:
        state = make_state(ScriptedEngine(), header_timeout_s=20)
        async with serving(state) as url, Raw(url) as raw:
            began = now()
            assert await raw.closed() == b""
            assert 20 <= now() - began < 21

    @in_virtual_time
    async def test_headers_at_a_byte_a_second(self) -> None:
        state = make_state(ScriptedEngine(), header_timeout_s=20)
        async with (
            serving(state) as url,
            Raw(url) as raw,
            dripping(raw, b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 99),
        ):
            began = now()
            answer = await raw.answer()
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")
            assert answer.headers["connection"] == "close"
            assert 20 <= now() - began < 22
            assert await raw.closed() == b""

    @in_virtual_time
    async def test_their_time_counts_anew_for_each_request(self) -> None:
        state = make_state(ScriptedEngine(), header_timeout_s=5, idle_timeout_s=75)
        async with serving(state) as url, Raw(url) as raw:
            for _ in range(3):
                await raw.send(b"GET /health HTTP/1.1\r\n")
                await asyncio.sleep(4)
                await raw.send(b"\r\n")
                assert (await raw.answer()).status == 200
                await asyncio.sleep(60)  # idle, within its limit
            await raw.send(b"GET /health")
            assert (await raw.answer()).status == 408

    @in_virtual_time
    async def test_blank_lines_are_no_beginning(self) -> None:
        state = make_state(ScriptedEngine(), header_timeout_s=20)
        async with serving(state) as url, Raw(url) as raw, dripping(raw, b"\r\n" * 100):
            began = now()
            assert await raw.closed() == b""
            assert now() - began < 22


class TestBodies:
    @in_virtual_time
    async def test_a_body_at_a_byte_a_second(self) -> None:
        state = make_state(ScriptedEngine(), body_timeout_s=30)
        async with serving(state) as url, Raw(url) as raw:
            await raw.send(HEAD)
            began = now()
            async with dripping(raw, BODY):
                answer = await raw.answer()
                assert (answer.status, answer.error["code"]) == (408, "request_timeout")
                assert "30 s" in answer.error["message"]
                assert 30 <= now() - began < 32
                assert await raw.closed() == b""

    @in_virtual_time
    async def test_a_slow_body_within_its_time(self) -> None:
        state = make_state(ScriptedEngine(), body_timeout_s=100)
        async with serving(state) as url, Raw(url) as raw:
            await raw.send(HEAD)
            async with dripping(raw, BODY):
                assert (await raw.answer()).status == 200

    @pytest.mark.parametrize("path", ["/nothing", "/health"])
    @in_virtual_time
    async def test_a_body_that_nobody_reads(self, path: str) -> None:
        async with serving(make_state(ScriptedEngine())) as url, Raw(url) as raw:
            await raw.send(b"POST %s HTTP/1.1\r\nContent-Length: 1000\r\n\r\n" % path.encode())
            assert (await raw.answer()).status in (404, 405)
            began = now()
            async with dripping(raw, b"x" * 1000):
                await raw.closed()
            assert now() - began < 10

    async def test_large_bodies_that_are_not_whole_are_bounded_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("guiderail.server.api.reception.LARGE_BYTES", 1000)
        monkeypatch.setattr("guiderail.server.api.reception.MAX_LARGE_BYTES", 5000)
        state = make_state(ScriptedEngine())
        large = BODY + b" " * 4000
        async with serving(state) as url:
            async with Raw(url) as first:
                await first.send(post(PATH, large)[:-1])
                async with Raw(url) as second:
                    await second.send(post(PATH, large)[:-1])
                    answers = [asyncio.create_task(raw.answer()) for raw in (first, second)]
                    done, waiting = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                    (refused,) = done
                    answer = refused.result()
                    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (
                        503,
                        "overloaded",
                        "1",
                    )
                    assert (await exchange(url, post(PATH, BODY))).status == 200  # small ones are taken
                    (other,) = waiting
                    await (first if other is answers[0] else second).send(b" ")
                    assert (await other).status == 200
            assert (await exchange(url, post(PATH, large))).status == 200


class TestIdle:
    @in_virtual_time
    async def test_it_counts_from_the_last_answer(self) -> None:
        state = make_state(ScriptedEngine(), idle_timeout_s=75)
        async with serving(state) as url, Raw(url) as raw:
            for _ in range(2):
                await raw.send(post(PATH, BODY))
                assert (await raw.answer()).status == 200
                await asyncio.sleep(70)
            await raw.send(b"\r\n")  # no request
            began = now()
            assert await raw.closed() == b""
            assert now() - began <= 6

    @in_virtual_time
    async def test_hundreds_of_them_end_and_others_are_served_meanwhile(self) -> None:
        state = make_state(ScriptedEngine())
        async with serving(state) as url:
            silent = [Raw(url) for _ in range(100)]
            for each in silent:
                await each.__aenter__()
            for each in silent[:50]:
                await each.send(b"GET /health HTTP/1.1\r\nA:")
            assert (await exchange(url, post(PATH, BODY))).status == 200
            ends = await asyncio.gather(*(each.closed() for each in silent))
            assert [end[:12] for end in ends] == [b"HTTP/1.1 408"] * 50 + [b""] * 50
            for each in silent:
                await each.__aexit__()


class TestReaders:
    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_client_that_does_not_read_loses_its_answer_and_frees_the_engine(self, stream: bool) -> None:
        engine = ScriptedEngine(lambda seed: ["x" * 10_000] * 100_000, max_model_len=200_000)
        state = make_state(engine, write_timeout_s=0.2)
        body = STREAM if stream else STREAM.replace(b"true", b"false").replace(b"100000", b"3000")
        async with serving(state) as url, Raw(url) as raw:
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await raw.send(post(PATH, body))
            await until(lambda: engine.peak == 1, 10)
            await until(lambda: engine.num_running() == 0 and not _connections(), 60)
            assert state.metrics.in_flight == 0

    async def test_a_client_that_reads_slowly_gets_all(self) -> None:
        engine = ScriptedEngine(lambda seed: ["x" * 10_000] * 300, max_model_len=2000)
        state = make_state(engine, write_timeout_s=30)
        body = STREAM.replace(b"100000", b"300")
        async with serving(state) as url, Raw(url) as raw:
            await raw.send(post(PATH, body))
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.3)
            raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
            answer = await raw.answer()
        assert answer.body.count(b"x" * 10_000) == 300
        assert answer.body.endswith(b"data: [DONE]\n\n")


def _connections() -> list[object]:
    """Connections of the server in this process."""
    import gc

    from guiderail.server.api.connection import Connection

    return [each for each in gc.get_objects() if type(each) is Connection and each.parser is not None]


async def test_connections_beyond_the_limit_are_told_so() -> None:
    async with serving(make_state(ScriptedEngine(), max_connections=2)) as url:
        async with Raw(url), Raw(url) as second:
            async with Raw(url) as third:
                await third.send(b"GET /health HTTP/1.1\r\n\r\n")
                answer = await third.answer()
                assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
                assert "2 connections" in answer.error["message"]
                assert await third.closed() == b""
            await second.send(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await second.answer()).status == 200
        await until(lambda: not _connections())
        assert (await exchange(url, b"GET /health HTTP/1.1\r\n\r\n")).status == 200


@pytest.mark.parametrize(
    "sent", [HEAD, HEAD + BODY[:9], b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{" % PATH.encode()]
)
async def test_a_client_that_hangs_up_in_its_body_leaves_one_line(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(make_state(ScriptedEngine())) as url:
        for _ in range(5):
            async with Raw(url) as raw:
                await raw.send(sent)
                await asyncio.sleep(0.02)
        await until(lambda: len(caplog.records) >= 5)
        assert (await exchange(url, post(PATH, BODY))).status == 200
    lines = [record.getMessage() for record in caplog.records if record.name != "httpx"]
    assert len(lines) == 6, lines
    assert sum(f"POST {PATH} 499" in line for line in lines) == 5
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("pieces", [[b"GET /health HT", b"TP/1.1\r", b"\n", b"\r\n"]])
@pytest.mark.parametrize("more", [b"", b"GET /v1/models HTTP/1.1\r\n\r\n"])
async def test_requests_sent_ahead_are_answered_in_order(pieces: list[bytes], more: bytes) -> None:
    engine = ScriptedEngine(step_s=0.02)
    async with serving(make_state(engine)) as url, Raw(url) as raw:
        await raw.send(post(PATH, BODY) + more)
        for piece in pieces:
            await raw.send(piece)
            await asyncio.sleep(0.01)
        kinds = [(await raw.answer()).body for _ in range(3 if more else 2)]
    assert b"chat.completion" in kinds[0]
    assert kinds[-1] == b'{"status":"ok"}'


ENDLESS = STREAM.replace(b"true", b"false")


GET = b"GET /health HTTP/1.1\r\n\r\n"
LARGE = post(PATH, BODY + b" " * 1_000_000)


@pytest.mark.parametrize("more", [b"", GET, HEAD, b"\x00", GET * 100, LARGE])
async def test_a_client_that_hangs_up_frees_the_engine_whatever_it_has_sent_ahead(more: bytes) -> None:
    engine = ScriptedEngine(lambda seed: ["w"] * 100_000, step_s=0.01, max_model_len=200_000)
    async with serving(make_state(engine)) as url:
        async with Raw(url) as raw:
            await raw.send(post(PATH, ENDLESS))
            await until(lambda: engine.num_running() == 1)
            await raw.send(more)
            await asyncio.sleep(0.02)
        await until(lambda: engine.num_running() == 0)


@pytest.mark.parametrize(("more", "answered"), [(GET * 5, 6), (GET * 100, 9), (LARGE, 1), (GET + LARGE, 2)])
async def test_what_is_sent_ahead_is_bounded(more: bytes, answered: int) -> None:
    engine = ScriptedEngine(step_s=0.1)
    async with serving(make_state(engine)) as url, Raw(url) as raw:
        await raw.send(post(PATH, BODY))
        await until(lambda: engine.num_running() == 1)
        sending = asyncio.create_task(raw.send(more))
        for _ in range(answered):
            assert (await raw.answer()).status == 200
        sending.cancel()
        if answered != 6:
            with contextlib.suppress(ConnectionError):
                assert await raw.closed() == b""


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_no_request_behind_one_that_runs_ends_both(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(lambda seed: ["w"] * 100_000, step_s=0.01, max_model_len=200_000)
    async with serving(make_state(engine)) as url, Raw(url) as raw:
        await raw.send(post(PATH, STREAM if stream else ENDLESS))
        await until(lambda: engine.num_running() == 1)
        if stream:
            await raw.reader.readuntil(b'"content":"w"')
        await raw.send(b"GET /v1/models HTTP/1.1\r\n\r\n" + b"nonsense\r\n\r\n")
        if stream:  # nothing can be said in the midst of an answer
            with contextlib.suppress(ConnectionError):
                assert b"HTTP/1.1" not in await raw.closed()
        else:
            assert (await raw.answer()).error["code"] == "invalid_http"
        await until(lambda: engine.num_running() == 0)
    assert not any(record.exc_info for record in caplog.records)
