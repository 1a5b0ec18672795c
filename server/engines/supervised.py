"""Restart of a dead engine: watches the inner engine's processes and builds a new one when they die.

While it is down every call raises EngineUnavailable, which the API answers with 503. An engine whose processes live and
that does not answer is waited for: `answers` tells. Prompts for a policy on another server go there instead; they carry
its name as their adapter.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.interfaces import Engine, Rollouts
from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.server.engines.engine_stats import EngineStats
from guiderail.server.engines.served_engine import LocalEngine

log = logging.getLogger("guiderail.engine")


class SupervisedEngine:
    """server.engines.served_engine.ServedEngine in front of one that `build` starts, anew whenever that dies."""

    def __init__(
        self,
        build: Callable[[], Awaitable[LocalEngine]],
        *,
        on_restart: Callable[[], None] = lambda: None,
        remote: Mapping[str, Engine] | None = None,
        poll_s: float = 0.25,
        backoff_s: float = 1.0,
        silent_s: float = 15.0,
    ) -> None:
        """Check for death every `poll_s`; retry failed restarts after backoff_s, doubling to 60 s.

        silent_s: an engine that does not answer a question within this time is said not to, until it does.

        remote: policies on other servers by name. The caller starts and closes them.
        """
        self._build = build
        self._remote = remote or {}
        self._on_restart = on_restart
        self._poll_s = poll_s
        self._backoff_s = backoff_s
        self._silent_s = silent_s
        self._silent = False
        self._inner: LocalEngine | None = None
        self._watches: list[asyncio.Task[None]] = []
        self._cause = ""
        self.max_model_len = self.vocab_size = self.max_logprobs = 0
        self.dtype = ""

    async def start(self) -> None:
        """Build the engine for the first time. Raises what `build` raises."""
        await self._adopt()
        self._watches = [asyncio.create_task(work) for work in (self._watch_over(), self._listen())]

    async def close(self) -> None:
        """End the engine and the watch over it."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if self._inner is not None:
            inner, self._inner = self._inner, None
            await inner.close()

    @property
    def up(self) -> bool:
        """True while requests are served."""
        return self._inner is not None and self._inner.up

    @property
    def answers(self) -> bool:
        """True while requests are served and the engine answers."""
        return self.up and not self._silent

    @property
    def stats(self) -> EngineStats:
        """Counts of the present engine since its start."""
        return self._inner.stats if self._inner is not None else EngineStats()

    def num_running(self) -> int:
        """Sequences that the engine has not finished."""
        return self._inner.num_running() if self._inner is not None else 0

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> Rollouts:
        return self._of(prompts).generate(prompts, sampling, seeds=seeds, deadline=deadline)

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        return await self._of(prompts).next_token_logprobs(prompts, top_k)

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return await self._of(prompts).answer_logprobs(prompts, answers)

    def _of(self, prompts: Sequence[TokenPrompt]) -> Engine:
        """Return the engine of the policy that these prompts are for."""
        names = {prompt.adapter for prompt in prompts}
        if not names & self._remote.keys():
            return self._now()
        if len(names) > 1:
            raise RequestError("prompts for a policy on another server are asked apart from others")
        return self._remote[names.pop() or ""]

    def _now(self) -> LocalEngine:
        if self._inner is None or not self._inner.up:
            raise EngineUnavailable(f"the engine is down: {self._cause}" if self._cause else "the engine is down")
        return self._inner

    async def _adopt(self) -> None:
        inner = await self._build()
        self.max_model_len, self.vocab_size, self.max_logprobs = (
            inner.max_model_len,
            inner.vocab_size,
            inner.max_logprobs,
        )
        self.dtype = inner.dtype
        self._inner = inner

    async def _watch_over(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            if self._inner is None or self._inner.up:
                continue
            dead, self._inner = self._inner, None
            self._cause = await dead.cause_of_death()
            log.error("the engine died: %s; starting it again", self._cause)
            with contextlib.suppress(Exception):
                await dead.close()
            wait = self._backoff_s
            while self._inner is None:
                try:
                    await self._adopt()
                except Exception as error:
                    self._cause = str(error)
                    log.error("the engine does not start: %s; next try in %.0f s", error, wait)
                    await asyncio.sleep(wait)
                    wait = min(60.0, wait * 2)
            self._cause = ""
            self._on_restart()
            log.warning("the engine serves again")

    async def _listen(self) -> None:
        """Ask the engine for a sign of life again and again; note when none comes in time, and when one does."""
        while True:
            asked = self._inner
            if asked is not None and asked.up:
                began = time.monotonic()
                question = asyncio.create_task(asked.answer())
                try:
                    while not (await asyncio.wait([question], timeout=self._silent_s))[0] and asked is self._inner:
                        if not self._silent:
                            self._silent = True
                            log.error("the engine has not answered for %.0f s", self._silent_s)
                finally:
                    question.cancel()
                failed = (await asyncio.gather(question, return_exceptions=True))[0] is not None
                if self._silent and not failed:
                    log.warning("the engine answers again, after %.0f s", time.monotonic() - began)
                self._silent = failed and asked is self._inner
            await asyncio.sleep(self._silent_s / 3)
