"""Short steps: where prompts are not chunked, a plain chat waits neither for long prefills nor for many sequences.

Everything that decodes waits for the end of a step, and so does whatever arrives meanwhile. So sequences that run alone
(plain chats) start in the next step, all of them; while others decode, a step prefills about PROMPT_TOKENS of wide
requests' prompts, and none beside a plain chat if the step before did. Where many sequences of wide requests decode,
they sit out the step in which a plain chat starts, but never two steps in a row. Plain chats never sit out: that would
only move time from each one's first token to the next token of all others. Where no plain chat decodes or starts nobody
looks at a single token, and everything that waits starts at once.
"""

from collections.abc import Iterable

from vllm.v1.request import Request

from guiderail.server.engines.vllm.scheduling.scheduler_state import (
    SchedulerState,
    is_plain,
    recipe_of,
    tokens_left,
    waits_for_grammar,
)

PROMPT_TOKENS = 64  # on 2 cores a 135M model prefills them in about 20 ms, and decodes a step in 15
MANY_SEQUENCES = 16  # so many take as long to decode as the fixed part of a step, the price of one more


class ShortSteps:
    """Limits of the next step, from the state before it and from what the last one did."""

    def __init__(self) -> None:
        self._prefilled_others = False  # the last step prefilled sequences other than plain chats
        self._sat_out = False  # sequences sat out the last step

    def plan(self, state: SchedulerState, *, unlimited: bool) -> tuple[int, list[Request]]:
        """Return the most tokens of the next step, and the running sequences that sit it out.

        unlimited: take all that the step can hold.
        """
        limit, sit_out = (state.max_tokens, []) if unlimited else self._limit(state)
        self._sat_out = bool(sit_out)
        return limit, sit_out

    def note_started(self, started: Iterable[Request]) -> None:
        """Note the sequences that have started in the step."""
        self._prefilled_others = not all(map(is_plain, started))

    def _limit(self, state: SchedulerState) -> tuple[int, list[Request]]:
        most, running = state.max_tokens, state.running
        if not running or state.chunks_prefills:
            return most, []
        ready = [each for each in state.waiting if not waits_for_grammar(each)]
        if not ready:
            return most, []
        chats = [each for each in ready if is_plain(each)]
        if not chats and not any(map(is_plain, running)):
            return most, []
        needs = sum(_prefill_tokens(state, each) for each in chats)
        decoding = sum(map(tokens_left, running))
        if chats and not self._sat_out and (sit_out := _sit_out(state, len(chats))):
            return min(most, decoding - sum(map(tokens_left, sit_out)) + needs), sit_out
        others = 0 if chats and self._prefilled_others else PROMPT_TOKENS
        return min(most, decoding + max(needs + others, _prefill_tokens(state, ready[0]))), []


def _sit_out(state: SchedulerState, chats_to_start: int) -> list[Request]:
    """Return the sequences that sit out the step in which so many plain chats start, none if that would not help."""
    running = state.running
    wide = [each for each in running if not is_plain(each)]
    chats = len(running) - len(wide)
    helps = (
        len(wide) >= MANY_SEQUENCES
        and len(running) + chats_to_start <= state.max_sequences  # vLLM counts the places of those it sees,
        and state.free_blocks >= chats  # and takes blocks from those alone
        and not any(map(recipe_of, running))  # sequences of a group stay in lockstep
    )
    return wide if helps else []


def _prefill_tokens(state: SchedulerState, request: Request) -> int:
    """Return the tokens of a waiting sequence that its first step computes; of a short one all count."""
    return int(request.num_tokens) if request.num_tokens <= PROMPT_TOKENS else state.uncached_tokens(request)
