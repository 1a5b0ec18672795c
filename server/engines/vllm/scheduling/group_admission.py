"""Group admission: the sequences of a mixture start in one step, so that they decode in lockstep.

Before each step the sequences of groups that cannot start whole are held back: those of which some have not arrived,
and those for which the step lacks places, tokens or KV blocks. What waits behind one of the latter is held back too, so
that no group starves. Preemption can still part a group; mixture/lockstep.py deals with that.
"""

from vllm.v1.request import Request, RequestStatus

from guiderail.server.engines.vllm.scheduling.scheduler_state import (
    SchedulerState,
    recipe_of,
    tokens_left,
    waits_for_grammar,
)

WAITS = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)


class GroupAdmission:
    """Groups none of whose sequences has started."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Request]] = {}

    @property
    def pending(self) -> bool:
        """True while there is such a group, as of the last `hold`."""
        return bool(self._groups)

    def add(self, request: Request) -> None:
        """Note a new sequence."""
        if (recipe := recipe_of(request)) is not None:
            self._groups.setdefault(recipe.group, []).append(request)

    def hold(self, state: SchedulerState) -> list[Request]:
        """Return the waiting sequences that must not start in the next step."""
        for name, members in list(self._groups.items()):
            alive = [each for each in members if not each.is_finished()]
            if alive and all(each.status in WAITS for each in alive):
                self._groups[name] = alive
            else:
                del self._groups[name]
        places = state.max_sequences - len(state.running)
        tokens = state.max_tokens - sum(map(tokens_left, state.running))
        blocks = state.free_blocks
        too_long = max(state.max_tokens - state.max_sequences, state.max_tokens // 2)
        idle, stuck = not state.running, False
        starts: dict[str, bool] = {}
        held = []
        for request in state.waiting:
            recipe = recipe_of(request)
            if recipe is None or recipe.group not in self._groups:
                if stuck:
                    held.append(request)
                elif not waits_for_grammar(request):
                    places, tokens, idle = places - 1, tokens - tokens_left(request), False
                continue
            if recipe.group not in starts:
                members = self._groups[recipe.group]
                starts[recipe.group] = False
                if not stuck and len(members) == recipe.size and not any(map(waits_for_grammar, members)):
                    need = sum(map(state.uncached_tokens, members))
                    pages = sum(-(-each.num_tokens // state.block_size) + 1 for each in members)
                    fits = len(members) <= places and need <= tokens and pages <= blocks
                    # A group that would not fit later either starts now: it parts, but leaves its prompts in the cache.
                    if fits or idle or (need > too_long and len(members) <= places):
                        starts[recipe.group] = True
                        places, tokens, blocks, idle = places - len(members), tokens - need, blocks - pages, False
                    else:
                        stuck = True
            if not starts[recipe.group]:
                held.append(request)
        return held
