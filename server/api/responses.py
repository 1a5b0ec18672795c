"""Responses: a request's events folded once, into one JSON body or into server-sent events. Metrics see them here."""

import time
from collections.abc import AsyncGenerator

from guiderail.guides.core.types import Event, Final, Scored, Token, TokenLogprob
from guiderail.server.api.bodies import Body, ChatBody, Json, alignment_report, envelope, prompt_ids, token_ids, usage
from guiderail.server.api.transport import DONE, error_event, json_event, json_with
from guiderail.server.requests.run import running
from guiderail.server.requests.schemas import StreamOptions
from guiderail.server.state import ServerState

LOGPROB_BYTES = 80  # of an entry in a response, about


class _Fold:
    """The ends of a response's answers, as far as they have come."""

    def __init__(self, state: ServerState, body: Body) -> None:
        self.finals: dict[int, Final] = {}
        self.count = len(body.request.contexts)
        self._metrics = state.metrics
        self._request = body.request
        self._silent = True

    def take(self, index: int, event: Event) -> None:
        """Note an event of an answer, and tell the metrics."""
        if isinstance(event, Final):
            self.finals[index] = event
            self._metrics.selected(self._request.label, self._request.contexts[index].report)
        elif self._silent and isinstance(event, Token):
            self._silent = False
            self._metrics.first_token(self._request.label, time.monotonic() - self._request.spend.started)

    def report(self) -> Json:
        """Return the `alignment` of a response whose answers have all ended."""
        return alignment_report(self._request, [self.finals[i] for i in range(self.count)])


async def whole(state: ServerState, body: Body) -> bytes:
    """Run the request; return the JSON of the response that is not streamed."""
    fold = _Fold(state, body)
    texts: list[list[str]] = [[] for _ in range(fold.count)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(fold.count)]
    ids: list[list[int]] = [[] for _ in range(fold.count)]
    async with running(state, body.request) as events:
        async for index, event in events:
            fold.take(index, event)
            if isinstance(event, Token):
                texts[index].append(event.text)
                ids[index].extend(event.token_ids)
                logprobs[index].extend(event.logprobs or ())
    wanted = body.request.contexts[0].sampling.logprobs is not None

    def written() -> bytes:
        choices = (
            body.choice(i, "".join(texts[i]), logprobs[i] if wanted else None, fold.finals[i])
            | token_ids(body, i, ids[i], first=True)
            for i in range(fold.count)
        )
        rest = envelope(body, body.whole_object, []) | {"usage": usage(body.request), "alignment": fold.report()}
        return json_with(rest | (prompt_ids(body) if isinstance(body, ChatBody) else {}), "choices", choices)

    size = LOGPROB_BYTES * sum(1 + len(token.top) for tokens in logprobs for token in tokens)
    return await state.workers.run(body.request.client, size, written)


async def stream(state: ServerState, body: Body, options: StreamOptions) -> AsyncGenerator[bytes, None]:
    """Run the request; yield the response as server-sent events. An error after the first is an event of its own.

    Raises what the request raises before its first event, so that it can still become an HTTP status.
    """
    fold = _Fold(state, body)
    opened: set[int] = set()
    so_far = 0  # tokens of the answers that have been streamed

    def chunk(*choices: Json, **more: object) -> bytes:
        each: Json = {}
        if options.continuous_usage_stats:
            each = {"usage": usage(body.request, so_far)}
        elif options.include_usage:
            each = {"usage": None}
        return json_event(envelope(body, body.chunk_object, [*choices]) | each | more)

    try:
        async with running(state, body.request) as events:
            async for index, event in events:
                fold.take(index, event)
                if isinstance(event, Scored):
                    continue
                if first := index not in opened:
                    opened.add(index)
                    if (choice := body.opening(index)) is not None:
                        yield chunk(choice, **(prompt_ids(body) if len(opened) == 1 else {}))
                if isinstance(event, Token):
                    so_far += len(event.token_ids)
                    ids = token_ids(body, index, event.token_ids, first=first)
                    if event.text or event.logprobs is not None or ids:  # else held back: what may become a stop string
                        yield chunk(body.delta(index, event.text, event.logprobs) | ids)
                    continue
                last = len(fold.finals) == fold.count
                report = {"alignment": fold.report()} if last else {}
                if last and options.include_usage:
                    yield chunk(body.closing(index, event))
                    yield chunk(usage=usage(body.request), **report)
                else:
                    yield chunk(body.closing(index, event), **report)
    except Exception as error:
        if not opened:
            raise
        yield error_event(error)
    yield DONE
