"""The contract of a guide's run: Token and Scored events and, last, exactly one Final.

Guides may be other people's. Whatever one does wrong is an error that names it, and never a request that hangs, an
answer that is cut off or a nameless fault of the server.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import AsyncGeneratorType

from pydantic_core import to_json

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import GuideFailed, GuiderailError, raised_at, told
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Candidate, Event, Final, Scored, Token
from guiderail.server.openai_errors import ApiError

FINISH_REASONS = ("stop", "length", "content_filter")  # of OpenAI's, those that a guide's answer can have


class Contract:
    """The state of one run of the guide called `name`: whether it has kept its contract so far."""

    def __init__(self, name: str, *, debug: bool = False) -> None:
        """debug: errors say where in the guide they come from."""
        self._name = name
        self._debug = debug
        self._final: Final | None = None
        self._run: AsyncGenerator[Event, None] | None = None

    @asynccontextmanager
    async def events(self, guide: Guide, ctx: Context) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """Run the guide; leaving the block ends it. Raises GuideFailed for what is no error of Guiderail's."""
        try:
            run = guide.run(ctx)
            if not isinstance(run, AsyncGenerator):
                if isinstance(run, Coroutine):
                    run.close()
                raise self._failed(f"'run' gave {_kind(run)} and not an async generator")
            self._run = run
            async with aclosing(run) as events:
                yield events
        except (GuiderailError, ApiError):
            raise
        except (Exception, SystemExit) as error:  # a guide ends nothing but itself
            place = raised_at(error, type(guide)) if self._debug else ""
            raise GuideFailed(self._name, f"{told(error)}{place}") from error

    def holds_back(self, event: Event) -> bool:
        """Check the guide's next event; a Final is kept until the guide has ended. Raises GuideFailed."""
        if self._final is not None:
            raise self._failed(f"it yielded {_kind(event)} after its Final")
        if isinstance(event, Final):
            self._final = self._complete(event)
            return True
        if isinstance(event, Scored) or (isinstance(event, Token) and _is_piece(event)):
            return False
        raise self._failed(f"it yielded {_kind(event)}, which is no event")

    def final(self) -> Final:
        """Return the Final of a guide that has ended. Raises GuideFailed if there was none."""
        if self._final is None:
            raise self._failed("it ended without a Final")
        return self._final

    def _complete(self, final: Final) -> Final:
        """The Final, if it says which of its candidates is the answer, and why that ended."""
        if not isinstance(final.chosen, int) or not 0 <= final.chosen < len(final.candidates):
            raise self._failed(
                f"its Final chose {final.chosen!r}, which is none of its {len(final.candidates)} candidates"
            )
        chosen = final.candidates[final.chosen]
        told = (final.finish_reason, final.stop_reason, final.stopped_by, *map(_facts, final.candidates))
        if not isinstance(chosen, Candidate) or not isinstance(final.finish_reason, str) or not _is_json(told):
            raise self._failed("its Final holds what is no text or number")
        if final.finish_reason not in FINISH_REASONS:
            known = ", ".join(FINISH_REASONS)
            raise self._failed(f"its Final has finish_reason {final.finish_reason!r}; known are {known}")
        return final

    def _failed(self, reason: str) -> GuideFailed:
        """The error, with the line at which the guide is now."""
        frame = self._run.ag_frame if isinstance(self._run, AsyncGeneratorType) else None
        if self._debug and frame is not None:
            reason += f" ({Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name})"
        return GuideFailed(self._name, reason)


def _is_piece(token: Token) -> bool:
    """True if a token's text can be sent and its ids counted."""
    fine = isinstance(token.text, str) and isinstance(token.token_ids, list | tuple)
    return fine and (token.text.isascii() or _is_json(token.text))


def _facts(candidate: Candidate) -> object:
    """What clients are told of a candidate."""
    scores = (candidate.rewards, candidate.transformed, candidate.combined, candidate.adjusted, candidate.weight)
    return candidate.text, candidate.finish_reason, len(candidate.token_ids), *scores


def _is_json(value: object) -> bool:
    try:
        to_json(value)
    except ValueError:  # what it cannot write, half of a surrogate pair too
        return False
    return True


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"
