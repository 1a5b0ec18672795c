"""The one door to the engine and to reward models: wait in admission, run, be counted.

Every route that makes them work goes through `admitted`. A request for answers is run by `running`: one guide run per
answer (`n`, times the prompts of a text completion), which share one spend and one deadline; their events come merged.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

from guiderail.guides.core.types import Event, Token
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.admission import Work
from guiderail.server.requests.build import Request
from guiderail.server.requests.contract import Contract
from guiderail.server.requests.delivered import Delivered
from guiderail.server.state import ServerState


@asynccontextmanager
async def admitted(state: ServerState, work: Work) -> AsyncIterator[None]:
    """Hold what the work takes of the engine for the block. Its outcome, time and spend go into the metrics.

    Raises ApiError (429) at once if the server is overloaded, and DeadlinePassed if the deadline passes meanwhile.
    """
    state.metrics.arrived()
    outcome = "cancelled"  # what is left if neither the end nor an error comes
    try:
        slot = state.admission.slot(
            work.rows, work.tokens, client=work.client, priority=work.priority, deadline=work.deadline
        )
        async with slot as waited:
            work.spend.queued_s = waited
            began = time.monotonic()
            try:
                yield
            finally:
                state.admission.finished(work.spend.tokens_generated, time.monotonic() - began, work.rows)
        outcome = "success"
    except Exception as error:
        outcome = "overloaded" if isinstance(error, ApiError) and error.status == 429 else "error"
        raise
    finally:
        seconds = time.monotonic() - work.spend.started
        state.metrics.finished(work.label, outcome, work.spend, seconds, work.client.label)


@asynccontextmanager
async def running(state: ServerState, request: Request) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
    """Give (answer's index, event) of all answers as they come, once admitted. Leaving the block cancels all work.

    Raises what `admitted` raises, and what guides, rewards and the engine do.
    """
    debug = state.settings.debug
    merged = _answer(request, 0, debug) if len(request.contexts) == 1 else _merged(request, debug)
    async with admitted(state, request), aclosing(merged) as events:
        yield events


async def _merged(request: Request, debug: bool) -> AsyncGenerator[tuple[int, Event], None]:
    queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(_answer(request, index, debug)) as events:
                async for item in events:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(request.contexts))]
    try:
        for _ in tasks:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(request: Request, index: int, debug: bool) -> AsyncGenerator[tuple[int, Event], None]:
    """One answer's events: the guide's, held to its contract, with clean text. Its Final comes once it has ended."""
    ctx, accepted = request.contexts[index], 0
    cleaner = ctx.dialogue.cleaner()
    delivered = None if ctx.sampling.logprobs is None else Delivered(ctx.dialogue.decoder())
    contract = Contract(request.alignment.guide_name, debug=debug)
    async with ctx, contract.events(request.alignment.guide, ctx) as events:
        async for event in events:
            if contract.holds_back(event):
                continue
            if isinstance(event, Token):
                accepted += len(event.token_ids)
                text, logprobs = cleaner.push(event.text), None  # log-probabilities may be for selection alone
                if delivered is not None:
                    logprobs = delivered.take(event.logprobs or (), event.text, text) or None
                event = Token(text, event.token_ids, logprobs)
            yield index, event
    final = contract.final()
    if rest := cleaner.finish():
        yield index, Token(rest, (), None if delivered is None else delivered.take((), "", rest) or None)
    request.spend.tokens_accepted += accepted
    yield index, final
