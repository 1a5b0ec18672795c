"""A vLLM scheduler that lets the rows of a group (mixed.py) begin in one step, to decode in lockstep; and short steps.

Everything else is vLLM's. All that decodes waits for the end of a step, and so does what comes meanwhile. So where
prompts are not chunked, rows that run alone (plain chats) begin in the next step, all of them; while others decode, a
step reads about PROMPT_TOKENS of the prompts of wide requests' rows, and none beside a plain chat if the step before
did. Where many rows of wide requests decode they sit out the step in which a plain chat begins, though not twice on
end. Plain chats never do: it would only move time from each one's first token to all the others' next ones. Where
no plain chat decodes or begins nobody sees a single token, and all that waits begins at once.

Before each step the rows of groups that cannot begin whole are taken out of the waiting queue for the time of the
step: those that have not all come, and those for which the step has not the places, tokens or KV blocks. What waits
behind one of the latter is taken out with it, so that no group starves. Preemption can still part a group; mixed.py
deals with that.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from guiderail.server.engines.parent import end_with_parent
from guiderail.server.engines.vllm.mixture.recipe import Recipe
from guiderail.server.engines.vllm.params import PRIORITY_STRIDE

PROMPT_TOKENS = 64  # on 2 cores a 135M model reads them in about 20 ms, and decodes a step in 15
MANY_ROWS = 16  # so many rows take as long to decode as the fixed part of a step, the price of one more
WAITS = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)


class _Gate(Scheduler):  # type: ignore[misc]
    max_num_scheduled_tokens: int
    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()  # of all that is ours, this alone is in vLLM's core process wherever the model is
        self._groups: dict[str, list[Request]] = {}  # rows that wait, of groups none of which has begun
        self._read_others = False  # whether the last step read prompts of other than plain chats
        self._sat_out = False  # whether rows sat out the last step

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if (recipe := _recipe(request)) is not None:
            self._groups.setdefault(recipe.group, []).append(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        held = self._hold() if self._groups else []
        most, running = self.max_num_scheduled_tokens, self.running
        self.max_num_scheduled_tokens, sit_out = self._bound(most)
        self._sat_out = bool(sit_out)
        if sit_out:
            self.running = list(filter(_is_plain, running))
        try:
            output = super().schedule(throttle_prefills)
            begun = (self.requests[row.req_id] for row in output.scheduled_new_reqs)
            self._read_others = not all(map(_is_plain, begun))
            return output
        finally:
            self.max_num_scheduled_tokens = most
            if sit_out:
                self.running = sit_out + self.running
            for request in held:
                self._enqueue_waiting_request(request)

    def _bound(self, most: int) -> tuple[int, list[Request]]:
        """Tokens of the next step, `most` at most, and the rows that decode but sit it out."""
        if self._groups or not self.running or self.scheduler_config.enable_chunked_prefill:
            return most, []
        begins = [row for row in (*self.kv_holding_waiting, *self.waiting) if not _waits_for_grammar(row)]
        if not begins:
            return most, []
        chats = [row for row in begins if _is_plain(row)]
        if not chats and not any(map(_is_plain, self.running)):
            return most, []
        needs = sum(map(self._unread, chats))
        decoding = sum(map(_tokens_left, self.running))
        if chats and not self._sat_out and (sit_out := self._who_sits_out(len(chats))):
            return min(most, decoding - sum(map(_tokens_left, sit_out)) + needs), sit_out
        others = 0 if chats and self._read_others else PROMPT_TOKENS
        return min(most, decoding + max(needs + others, self._unread(begins[0]))), []

    def _who_sits_out(self, begins: int) -> list[Request]:
        """The rows that sit out the step in which so many plain chats begin, if that helps."""
        wide = [row for row in self.running if not _is_plain(row)]
        chats = len(self.running) - len(wide)
        helps = (
            len(wide) >= MANY_ROWS
            and len(self.running) + begins <= self.max_num_active_reqs  # vLLM counts the places of those it sees,
            and self.kv_cache_manager.block_pool.get_num_free_blocks() >= chats  # and takes blocks from those alone
            and not any(map(_recipe, self.running))  # rows of a group stay in lockstep
        )
        return wide if helps else []

    def _unread(self, row: Request) -> int:
        """Tokens of a row that waits that its first step reads (of a short one: all)."""
        return int(row.num_tokens) if row.num_tokens <= PROMPT_TOKENS else self._uncached(row)

    def _uncached(self, row: Request) -> int:
        return int(row.num_tokens - self.kv_cache_manager.get_computed_blocks(row)[1])

    def _hold(self) -> list[Request]:
        """Takes what must not begin in this step out of the waiting queue and returns it."""
        for name, rows in list(self._groups.items()):
            here = [row for row in rows if not row.is_finished()]
            if here and all(row.status in WAITS for row in here):
                self._groups[name] = here
            else:
                del self._groups[name]
        held = self._choose()
        self.waiting.remove_requests(held)
        self.deferred_waiting.difference_update(held)
        return held

    def _choose(self) -> list[Request]:
        places = self.max_num_active_reqs - len(self.running)
        tokens = self.max_num_scheduled_tokens - sum(map(_tokens_left, self.running))
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        too_long = max(self.max_num_scheduled_tokens - self.max_num_active_reqs, self.max_num_scheduled_tokens // 2)
        idle, stuck = not self.running, False
        begins: dict[str, bool] = {}
        held = []
        for row in (*self.kv_holding_waiting, *self.waiting):
            recipe = _recipe(row)
            if recipe is None or recipe.group not in self._groups:
                if stuck:
                    held.append(row)
                elif not _waits_for_grammar(row):
                    places, tokens, idle = places - 1, tokens - _tokens_left(row), False
                continue
            if recipe.group not in begins:
                rows = self._groups[recipe.group]
                begins[recipe.group] = False
                if not stuck and len(rows) == recipe.size and not any(map(_waits_for_grammar, rows)):
                    need = sum(map(self._uncached, rows))
                    pages = sum(-(-each.num_tokens // self.block_size) + 1 for each in rows)
                    fits = len(rows) <= places and need <= tokens and pages <= blocks
                    # What would not fit later either begins now: its rows part, but leave their prompts in the cache.
                    if fits or idle or (need > too_long and len(rows) <= places):
                        begins[recipe.group] = True
                        places, tokens, blocks, idle = places - len(rows), tokens - need, blocks - pages, False
                    else:
                        stuck = True
            if not begins[recipe.group]:
                held.append(row)
        return held


def _recipe(request: Request) -> Recipe | None:
    params = request.sampling_params
    return None if params is None else Recipe.of(params.extra_args)


def _is_plain(request: Request) -> bool:
    """Whether a row runs alone, as plain chats do (vllm_params.row_priority)."""
    return bool(request.priority % PRIORITY_STRIDE == 0)


def _tokens_left(request: Request) -> int:
    """Tokens that a row takes of this step, if it gets all it wants."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)


def _waits_for_grammar(request: Request) -> bool:
    return bool(
        request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        and request.structured_output_request is not None
        and request.structured_output_request.grammar is None
    )


class GroupScheduler(_Gate):
    """vLLM's plain scheduler, groups beginning whole."""


class AsyncGroupScheduler(_Gate, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler, groups beginning whole."""
