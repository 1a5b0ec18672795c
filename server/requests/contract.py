"""A guide's run, held to its contract: Token and Scored events and, last, exactly one Final.

Guides may be other people's. Whatever one does wrong is an error that names it, and never a request that hangs, an
answer that is cut off or a nameless fault of the server.
"""

from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing

from guiderail.guides.core.context import Context
from guiderail.guides.core.errors import GuideFailed, GuiderailError
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.types import Event, Final, Scored, Token
from guiderail.server.openai_errors import ApiError


async def guided(name: str, guide: Guide, ctx: Context) -> AsyncGenerator[Event, None]:
    """The events of `guide`, whose name is `name`; its Final comes once the guide has ended.

    Raises GuideFailed if the guide raises what is no error of Guiderail's or breaks its contract.
    """
    final: Final | None = None
    try:
        run = guide.run(ctx)
        if not isinstance(run, AsyncGenerator):
            if isinstance(run, Coroutine):
                run.close()
            raise GuideFailed(name, f"'run' gave {_kind(run)} and not an async generator")
        async with aclosing(run) as events:
            async for event in events:
                if final is not None:
                    raise GuideFailed(name, f"it yielded {_kind(event)} after its Final")
                if isinstance(event, Final):
                    final = _complete(name, event)
                elif isinstance(event, Scored) or (isinstance(event, Token) and isinstance(event.text, str)):
                    yield event
                else:
                    raise GuideFailed(name, f"it yielded {_kind(event)}, which is no event")
    except (GuiderailError, ApiError):
        raise
    except Exception as error:
        raise GuideFailed(name, f"{type(error).__name__}: {error}") from error
    if final is None:
        raise GuideFailed(name, "it ended without a Final")
    yield final


def _complete(name: str, final: Final) -> Final:
    """The Final, if it says which of its candidates is the answer."""
    if not isinstance(final.chosen, int) or not 0 <= final.chosen < len(final.candidates):
        raise GuideFailed(
            name, f"its Final chose {final.chosen!r}, which is none of its {len(final.candidates)} candidates"
        )
    return final


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"
