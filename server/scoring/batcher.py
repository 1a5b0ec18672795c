"""The scorer: one queue per reward, drained in batches that mix the requests in flight.

Calls collect for a few milliseconds, and then for as long as the batch before them is scored; a batch is
filled under a token budget, one group of each request in turn, so that a request with many candidates does
not keep others waiting. A group whose caller was cancelled is dropped before it is scored. A failing group
fails its own request, by the reward's name, and no other; a refusal of a reward (RequestError) is the client's fault.
"""

import asyncio
import logging
import textwrap
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from guiderail.guides.core.errors import (
    AlignmentField,
    EngineUnavailable,
    FieldError,
    RequestError,
    RewardFailed,
    TooLong,
    raised_at,
    told,
)
from guiderail.guides.core.interfaces import ScoreResult
from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import ScoreGroup
from guiderail.guides.scoring.transforms import LIMIT
from guiderail.server.metrics import Metrics

log = logging.getLogger("guiderail.server")
MOST_TOKENS = 2**53  # that a result may say it has cost
END_S = 1.0  # for a reward that was told to end


@dataclass(slots=True)
class _Call:
    group: ScoreGroup
    owner: str
    future: asyncio.Future[ScoreResult]
    queued: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Rough cost of scoring: the prompt once, and every answer (in the served model's tokens)."""
        return len(self.group.prompt.token_ids) + sum(len(a.token_ids) or len(a.text) // 4 for a in self.group.answers)


class BatchingScorer:
    """guiderail.guides.Scorer over the server's rewards."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        metrics: Metrics,
        *,
        timeout_s: float | None = 60.0,
        max_tokens: int = 16384,
        wait_s: float = 0.002,
        debug: bool = False,
    ) -> None:
        """timeout_s: seconds for one batch of one reward; None: no limit (server/offline/offline_state.py).

        max_tokens: size of a batch (a larger group goes alone).
        wait_s: seconds that the first call of an idle reward waits for company.
        debug: errors say where a reward raised them.
        """
        self._rewards = rewards
        self._metrics = metrics
        self.timeout_s = timeout_s
        self._max_tokens = max_tokens
        self._wait_s = wait_s
        self._debug = debug
        self._pending: dict[str, list[_Call]] = {name: [] for name in rewards}
        self._drains: dict[str, asyncio.Task[None]] = {}

    async def score(self, reward: str, group: ScoreGroup, owner: str = "") -> ScoreResult:
        """Score one group, together with whatever else waits for the same reward.

        Raises RewardFailed, or RequestError for a conversation that the reward refuses.
        """
        if not self._rewards[reward].batched:
            try:
                return (await self._score(reward, [replace(group, owner=owner)]))[0]
            except RewardFailed:
                self._metrics.score_failed(reward)
                raise
        call = _Call(group, owner, asyncio.get_running_loop().create_future())
        self._pending[reward].append(call)
        if reward not in self._drains:
            self._drains[reward] = asyncio.create_task(self._drain(reward))
        return await call.future

    async def _drain(self, name: str) -> None:
        batch: list[_Call] = []
        cause = ""
        try:
            await asyncio.sleep(self._wait_s)
            while batch := self._take(name):
                self._metrics.score_batch(name, sum(len(c.group.answers) for c in batch))
                for call in batch:
                    self._metrics.score_wait(name, time.monotonic() - call.queued)
                await self._run(name, batch)
        except Exception as error:
            log.exception("the queue of reward '%s' failed", name)
            cause = f" by {told(error)}"
        finally:
            del self._drains[name]
            left, self._pending[name] = [*batch, *self._pending[name]], []
            for call in left:  # none, unless this was cut off: then nobody is left waiting
                if not call.future.done():
                    call.future.set_exception(RewardFailed(name, f"its queue was cut off{cause}"))

    def _take(self, name: str) -> list[_Call]:
        """Take the next batch: calls still wanted, one of each owner in turn, up to max_tokens."""
        turns: dict[str, deque[_Call]] = {}
        for call in self._pending[name]:
            if not call.future.done():
                turns.setdefault(call.owner, deque()).append(call)
        batch: list[_Call] = []
        tokens = 0
        owners = deque(turns)
        while owners:
            owner = owners.popleft()
            tokens += turns[owner][0].tokens
            if batch and tokens > self._max_tokens:
                break
            batch.append(turns[owner].popleft())
            if turns[owner]:
                owners.append(owner)
        taken = {id(call) for call in batch}
        self._pending[name] = [c for c in self._pending[name] if id(c) not in taken and not c.future.done()]
        return batch

    async def _run(self, name: str, batch: Sequence[_Call]) -> None:
        try:
            results = await self._score(name, [call.group for call in batch], [call.future for call in batch])
        except (RewardFailed, RequestError, EngineUnavailable) as failure:
            if len(batch) == 1 and not batch[0].future.done():  # else it was given up
                if not isinstance(failure, RequestError):
                    self._metrics.score_failed(name)
                batch[0].future.set_exception(failure)
            if len(batch) == 1:
                return
            for call in batch:  # find out whose fault it is, so that the others get their scores
                if not call.future.done():
                    await self._run(name, [call])
            return
        for call, result in zip(batch, results, strict=True):
            if not call.future.done():
                call.future.set_result(result)

    async def _score(
        self, name: str, groups: Sequence[ScoreGroup], wanted: Sequence[asyncio.Future[ScoreResult]] = ()
    ) -> list[ScoreResult]:
        """Score groups. wanted: who waits for them; once nobody does any more, the reward is told to end."""
        # A task of its own: one that ends is no end of ours, and one that takes no notice of its end is left behind.
        task = asyncio.create_task(self._asked(name, groups))

        def given_up(caller: asyncio.Future[ScoreResult]) -> None:
            if all(each.done() for each in wanted):
                task.cancel()

        for each in wanted:
            each.add_done_callback(given_up)
        try:
            await asyncio.wait({task}, timeout=self.timeout_s)
            if not task.done():
                raise RewardFailed(name, f"no scores within {self.timeout_s:g} s")
            if task.cancelled():
                raise RewardFailed(name, "it was cancelled by itself")
            return _checked(name, task.result(), groups)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=END_S)

    async def _asked(self, name: str, groups: Sequence[ScoreGroup]) -> object:
        """What the reward returns. Whatever it raises is its own fault, a refusal or the engine's."""
        try:
            return await self._rewards[name].score(groups)
        except (EngineUnavailable, RewardFailed):
            raise
        except RequestError as error:
            if error.param is None:
                raise FieldError(AlignmentField("rewards"), f": reward '{name}': {error}") from error
            kind = TooLong if isinstance(error, TooLong) else RequestError
            raise kind(f"reward '{name}': {error}", error.param) from error
        except (Exception, GeneratorExit, SystemExit) as error:  # the last would end the event loop
            place = raised_at(error, type(self._rewards[name])) if self._debug else ""
            raise RewardFailed(name, f"{told(error)}{place}") from error


def _checked(name: str, results: object, groups: Sequence[ScoreGroup]) -> list[ScoreResult]:
    """Return a reward's results if each group has one, of one finite number an answer. Raises RewardFailed."""
    if not isinstance(results, list | tuple) or len(results) != len(groups):
        raise RewardFailed(name, f"it returned {_shown(results)} where one result for each of {len(groups)} was due")
    checked = []
    for result, group in zip(results, groups, strict=True):
        if not isinstance(result, ScoreResult) or not (_is_count(result.tokens) and _are_texts(result.warnings)):
            raise RewardFailed(name, f"it returned {_shown(result)} for a ScoreResult")
        due = len(group.answers)
        try:
            values = tuple(islice(result.values, due + 1))
        except Exception:
            raise RewardFailed(name, f"it returned {_shown(result.values)} for a tuple of values") from None
        if len(values) != due:
            given = len(values) if len(values) < due else "more"
            raise RewardFailed(name, f"it returned a wrong number of values: {given} for {due}")
        checked.append(replace(result, values=tuple(_number(name, value) for value in values)))
    return checked


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 0) != 0:
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except Exception:
        raise RewardFailed(name, f"it returned {_shown(value)}, which is no number") from None
    if not abs(number) <= LIMIT:
        raise RewardFailed(name, f"it returned {number}; values must be finite, and at most {LIMIT:g} in size")
    return number


def _shown(value: object) -> str:
    try:
        return textwrap.shorten(repr(value), 80, placeholder=" ...")
    except Exception:
        return f"a value of type {type(value).__name__}"
