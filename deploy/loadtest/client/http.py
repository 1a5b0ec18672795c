"""Send one request over HTTP and time what comes back into its record."""

import asyncio
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp

from guiderail.loadtest.client.answer import AnswerReader, error_text
from guiderail.loadtest.client.event_stream import SseParser
from guiderail.loadtest.load.plan import Call
from guiderail.loadtest.load.text_file import parse_json
from guiderail.loadtest.report.records import Outcome, Record

# Less than the 5 s after which uvicorn closes an idle connection: reusing one at that moment would look like a
# server failure.
KEEP_ALIVE_S = 2.0


class Client:
    """A pool of connections without an upper bound, for use in `async with`."""

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 600.0,
        insecure: bool = False,
        keep_text: bool = False,
    ) -> None:
        self._headers, self._timeout_s = dict(headers or {}), timeout_s
        self._insecure, self._keep_text = insecure, keep_text

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=not self._insecure)
        headers = {"Content-Type": "application/json", **self._headers}
        none = aiohttp.ClientTimeout(total=None, sock_connect=None)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers, timeout=none)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get_json(self, url: str, timeout_s: float = 10.0) -> Any:
        """The JSON at an address. Raises aiohttp.ClientError or TimeoutError."""
        async with asyncio.timeout(timeout_s), self._session.get(url) as response:
            response.raise_for_status()
            return await response.json()

    async def send(self, call: Call, record: Record) -> None:
        """Send a request and read the answer; afterwards the record has an outcome.

        Raises nothing but CancelledError, which makes the outcome "cancelled" unless the request had ended.
        """
        reader = AnswerReader(record, self._keep_text)
        hang_up = call.cancel_after_s is not None and call.cancel_after_s <= self._timeout_s
        record.sent = time.perf_counter()
        try:
            async with asyncio.timeout(call.cancel_after_s if hang_up else self._timeout_s):
                await self._exchange(call, record, reader)
        except TimeoutError:
            if hang_up:
                reader.end(Outcome.CANCELLED, time.perf_counter())
            else:
                reader.end(Outcome.TIMEOUT, time.perf_counter(), f"not finished after {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            outcome = Outcome.CONNECTION_ERROR if record.status is None else Outcome.STREAM_ERROR
            reader.end(outcome, time.perf_counter(), f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            reader.end(Outcome.CANCELLED, time.perf_counter(), "the run was interrupted")
            raise
        except Exception as error:  # whatever a server sends is that request's outcome and not the end of the run
            reader.end(Outcome.STREAM_ERROR, time.perf_counter(), f"{type(error).__name__}: {error}")

    async def _exchange(self, call: Call, record: Record, reader: AnswerReader) -> None:
        headers = {"X-Request-Id": call.request_id}
        async with self._session.post(call.url, data=call.body, headers=headers) as response:
            record.status = response.status
            if response.status != 200:
                await _refused(response, record, reader)
            elif response.content_type == "text/event-stream":
                record.streamed = True
                await _stream(response, call, record, reader)
            else:
                body = await response.read()
                reader.body(body, time.perf_counter())


async def _stream(response: aiohttp.ClientResponse, call: Call, record: Record, reader: AnswerReader) -> None:
    parser = SseParser()
    async for piece in response.content.iter_any():
        now = time.perf_counter()
        for name, data in parser.feed(piece):
            reader.event(name, data, now)
        if call.cancel_after_chunks is not None and len(record.chunks) >= call.cancel_after_chunks:
            reader.end(Outcome.CANCELLED, now)
            response.close()
            return
    now = time.perf_counter()
    for name, data in parser.close():
        reader.event(name, data, now)
    reader.end_of_stream(now)


async def _refused(response: aiohttp.ClientResponse, record: Record, reader: AnswerReader) -> None:
    try:
        body = await response.read()
    except aiohttp.ClientError:  # the status is what matters; its reason was cut off
        body = b""
    try:
        seconds = float(response.headers["Retry-After"])
    except (KeyError, ValueError):  # a date instead of seconds is allowed too
        seconds = math.nan
    record.retry_after_s = seconds if 0 <= seconds < math.inf else None
    try:
        fault: Any = parse_json(body.decode("utf-8-sig"))
        message = error_text(fault.get("error") or fault)
    except (ValueError, AttributeError):
        message = body[:300].decode(errors="replace")
    outcome = Outcome.REJECTED if response.status == 429 else Outcome.HTTP_ERROR
    reader.end(outcome, time.perf_counter(), message or str(response.reason))
