"""Guides: a guide is an async generator over a Context that yields events (types.py)."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import ClassVar, Generic

from guiderail.guides.core.context import Context
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Candidate, Event, Final, P_co, Params, Token
from guiderail.guides.scoring.kl import PoolKind


class Guide(ABC, Generic[P_co]):
    """A guided decoder. Subclass it, describe it in the docstring's first line, and write `run`.

    Params: the class of its parameters, a subclass of Params, and the type of `self.params` in a Guide[ThatClass].
    streams: whether it commits text before its work is over.
    steers: whether rewards change its answer (else they are only reported).
    needs_rewards: whether a guide that steers cannot do without one.
    keeps_format: whether it can keep a `response_format` (each answer is one engine generation).
    """

    Params: ClassVar[type[Params]] = Params
    streams: ClassVar[bool] = False
    steers: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = True
    keeps_format: ClassVar[bool] = False

    def __init__(self, params: P_co) -> None:
        self.params = params

    def candidates(self) -> int:
        """Largest number of candidates alive at once for one answer; operators limit it."""
        return 1

    def pools(self) -> Mapping[PoolKind, int]:
        """The pools that it has the selection rule choose from, and the most candidates that each has.

        A rule that is not valid for all of them is refused. A guide that declares none can have no rule but argmax;
        one that does without a rule (`steers` or rewards apart) declares none.
        """
        return {}

    def rows(self) -> int:
        """Largest number of sequences in the engine at once for one answer; admission goes by it."""
        return self.candidates()

    def cost(self, max_tokens: int) -> int:
        """Most tokens of generation that an answer of `max_tokens` can take; admission goes by it."""
        return self.candidates() * max_tokens

    def refuses(self) -> Sequence[str]:
        """Sampling fields of a request that this guide cannot keep; one that is set is refused by name."""
        return ()

    def check(self, services: Services) -> None:
        """Refuse parameters that are well-formed but cannot work here, by raising ValueError."""
        return

    @abstractmethod
    def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        """Yield Token and Scored events and, last, exactly one Final. Closing it cancels the work."""
        ...


def answer_events(chosen: Candidate, candidates: Sequence[Candidate], stopped_by: str | None) -> tuple[Token, Final]:
    """The events that end a guide whose answer is a whole candidate."""
    reason = chosen.finish_reason if chosen.finished else "length"
    token = Token(chosen.text, chosen.token_ids, chosen.logprobs)
    return token, Final(reason, chosen.stop_reason, stopped_by, chosen.index, tuple(candidates))
