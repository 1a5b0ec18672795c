"""Folds a job's events into one JSON body or into server-sent events. Both see the same events."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from pydantic_core import to_json

from guiderail.guides.core.types import Event, Final, Scored, Token, TokenLogprob
from guiderail.server.api.responses import Wire, alignment_report, envelope, usage
from guiderail.server.metrics import Metrics
from guiderail.server.openai_errors import ApiError, from_exception
from guiderail.server.requests.build import Job

DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def observed(job: Job, metrics: Metrics) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
    """The job's events, with their times and the outcome put into the metrics."""
    guide = job.alignment.guide_name
    metrics.arrived()
    outcome = "cancelled"  # what is left if neither the end nor an error comes
    try:
        async with aclosing(_timed(job, metrics)) as events:
            yield events
        outcome = "success"
    except Exception as error:
        outcome = "overloaded" if isinstance(error, ApiError) and error.status == 429 else "error"
        raise
    finally:
        metrics.finished(guide, outcome, job.spend, time.monotonic() - job.spend.started)


async def _timed(job: Job, metrics: Metrics) -> AsyncGenerator[tuple[int, Event], None]:
    first = True
    async with aclosing(job.events()) as events:
        async for index, event in events:
            if isinstance(event, Final):
                metrics.selected(job.alignment.guide_name, job.contexts[index].report)
            if first and isinstance(event, Token):
                first = False
                metrics.first_token(job.alignment.guide_name, time.monotonic() - job.spend.started)
            yield index, event


async def whole(job: Job, wire: Wire, metrics: Metrics) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    count = len(job.contexts)
    texts: list[list[str]] = [[] for _ in range(count)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
    finals: dict[int, Final] = {}
    async with observed(job, metrics) as events:
        async for index, event in events:
            match event:
                case Token():
                    texts[index].append(event.text)
                    logprobs[index].extend(event.logprobs or ())
                case Final():
                    finals[index] = event
    wanted = job.contexts[0].sampling.logprobs is not None
    choices = [wire.choice(i, "".join(texts[i]), logprobs[i] if wanted else None, finals[i]) for i in range(count)]
    body = envelope(wire, wire.whole_object, choices)
    return {**body, "usage": usage(job), "alignment": alignment_report(job, [finals[i] for i in range(count)])}


async def chunks(job: Job, wire: Wire, metrics: Metrics, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The response as server-sent events. An error after the first event is sent as an event of its own.

    Raises what the job raises before its first event, so that it can still become an HTTP status.
    """
    finals: dict[int, Final] = {}
    opened: set[int] = set()
    count = len(job.contexts)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        body = envelope(wire, wire.chunk_object, choices) | more
        if include_usage:
            body.setdefault("usage", None)
        return b"data: " + to_json(body) + b"\n\n"

    try:
        async with observed(job, metrics) as events:
            async for index, event in events:
                if isinstance(event, Scored):
                    continue
                if index not in opened:
                    opened.add(index)
                    if (choice := wire.opening(index)) is not None:
                        yield chunk([choice])
                if isinstance(event, Token):
                    if not event.text and event.logprobs is None:
                        continue  # held back: half a character, or what may become a stop string
                    yield chunk([wire.delta(index, event.text, event.logprobs)])
                    continue
                finals[index] = event
                last = len(finals) == count
                report = {"alignment": alignment_report(job, [finals[i] for i in range(count)])} if last else {}
                if last and include_usage:
                    yield chunk([wire.closing(index, event)])
                    yield chunk([], usage=usage(job), **report)
                else:
                    yield chunk([wire.closing(index, event)], **report)
    except Exception as error:
        if not opened:
            raise
        yield b"data: " + to_json(from_exception(error).body) + b"\n\n"
    yield DONE


async def resumed(first: "asyncio.Task[bytes]", source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yields a stream's first item, which was asked for already, and the rest of `source`.

    An error that comes before the first chunk, but after the headers, is sent as an event.
    """
    try:
        try:
            yield await first
        except Exception as error:
            yield b"data: " + to_json(from_exception(error).body) + b"\n\n"
            yield DONE
            return
        async for item in source:
            yield item
    finally:
        first.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await first
        await source.aclose()
