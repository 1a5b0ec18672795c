"""The contract of a guide's run: Token and Scored events and, last, exactly one Final.

Guides may be other people's. Whatever one does wrong is an error that names it, and never a request that hangs, an
answer that is cut off or a nameless fault of the server.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import GuideFailed, GuiderailError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Event, Final, Scored, Token
from guiderail.server.openai_errors import ApiError


class Contract:
    """The state of one run of the guide called `name`: whether it has kept its contract so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._final: Final | None = None

    @asynccontextmanager
    async def events(self, guide: Guide, ctx: Context) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """Run the guide; leaving the block ends it. Raises GuideFailed for what is no error of Guiderail's."""
        try:
            run = guide.run(ctx)
            if not isinstance(run, AsyncGenerator):
                if isinstance(run, Coroutine):
                    run.close()
                raise GuideFailed(self._name, f"'run' gave {_kind(run)} and not an async generator")
            async with aclosing(run) as events:
                yield events
        except (GuiderailError, ApiError):
            raise
        except Exception as error:
            raise GuideFailed(self._name, f"{type(error).__name__}: {error}") from error

    def holds_back(self, event: Event) -> bool:
        """Check the guide's next event; a Final is kept until the guide has ended. Raises GuideFailed."""
        if self._final is not None:
            raise GuideFailed(self._name, f"it yielded {_kind(event)} after its Final")
        if isinstance(event, Final):
            self._final = self._complete(event)
            return True
        if isinstance(event, Scored) or (isinstance(event, Token) and isinstance(event.text, str)):
            return False
        raise GuideFailed(self._name, f"it yielded {_kind(event)}, which is no event")

    def final(self) -> Final:
        """Return the Final of a guide that has ended. Raises GuideFailed if there was none."""
        if self._final is None:
            raise GuideFailed(self._name, "it ended without a Final")
        return self._final

    def _complete(self, final: Final) -> Final:
        """The Final, if it says which of its candidates is the answer."""
        if not isinstance(final.chosen, int) or not 0 <= final.chosen < len(final.candidates):
            raise GuideFailed(
                self._name, f"its Final chose {final.chosen!r}, which is none of its {len(final.candidates)} candidates"
            )
        return final


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"
