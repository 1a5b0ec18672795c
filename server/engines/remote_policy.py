"""A policy on another vLLM server: continues token-id prompts over HTTP, for guides that roll out a baseline.

The wire format is vLLM's `POST /v1/completions` with token ids in (`prompt`) and out (`return_token_ids`). Each
sequence is a request of its own, so that it has its own seed and can be dropped alone: closing the connection frees it
on the server. Token ids mean the same here and there only if the tokenizers agree, so that is checked at the start.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.interfaces import Renderer, Rollouts
from guiderail.guides.core.types import Delta, Message, SamplingSpec, TokenPrompt
from guiderail.server.engines.policies import RemotePolicySpec
from guiderail.server.engines.sequences import EngineRollouts
from guiderail.server.engines.vllm_fields import body_of
from guiderail.server.remote.remote_client import NoResponse, RemoteClient, RemoteError, ResponseBody, parse_body
from guiderail.server.remote.remote_options import api_key

READ_S = 600.0
IN_FLIGHT = 256  # sequences of one policy at a time
ATTEMPTS = 2
PROBE = "Grüße, 世界! def f(x):\n    return x**2  # 3.14159 — naïve café 🙂"

log = logging.getLogger("guiderail.policy")


class _Choice(ResponseBody):
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None


class _Completion(ResponseBody):
    choices: list[_Choice]


class _Tokens(ResponseBody):
    tokens: list[int]


class RemotePolicy:
    """guiderail.guides.Engine for one policy on another server; it generates, and gives no log-probabilities."""

    def __init__(self, name: str, spec: RemotePolicySpec) -> None:
        """Raises EngineUnavailable if the environment variable of the key is not set."""
        key = api_key(spec.key_env)
        if key == "":
            raise EngineUnavailable(f"policy '{name}': the environment variable {spec.key_env} is not set")
        self._name = name
        self._spec = spec
        self._model = ""
        self._remote = RemoteClient(key, IN_FLIGHT, READ_S)

    async def start(self, renderer: Renderer) -> None:
        """Ask the server for its model and compare tokenizers. Raises EngineUnavailable with what is wrong."""
        texts = [PROBE]
        if renderer.has_chat_template:
            prompt = renderer.render([Message("user", PROBE)])
            texts.append(renderer.decode(prompt.token_ids, skip_special_tokens=False))
        try:
            self._model = (await self._remote.model(self._spec.url, self._spec.model)).id
            for text in texts:
                body = {"model": self._model, "prompt": text, "add_special_tokens": False}
                content = await self._remote.exchange(self._spec.url, "POST", "/tokenize", body)
                if parse_body(self._spec.url, _Tokens, content).tokens != renderer.encode(text):
                    raise RemoteError(self._spec.url, "has another tokenizer than the served model")
            await self._ask(TokenPrompt(tuple(renderer.encode(PROBE))), SamplingSpec(max_tokens=1), None)
        except RemoteError as error:
            raise EngineUnavailable(f"policy '{self._name}': {error}") from error

    def generate(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: SamplingSpec,
        *,
        seeds: Sequence[int | None] | None = None,
        deadline: float | None = None,
    ) -> Rollouts:
        sequences = [
            _RemoteSequence(index, partial(self._complete, prompt, sampling, seed))
            for index, (prompt, seed) in enumerate(zip(prompts, seeds or [sampling.seed] * len(prompts), strict=True))
        ]
        return EngineRollouts(sequences, deadline)

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        raise RequestError(f"policy '{self._name}' is on another server, which gives no log-probabilities")

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        raise RequestError(f"policy '{self._name}' is on another server, which gives no log-probabilities")

    async def close(self) -> None:
        """Close the connections."""
        await self._remote.close()

    async def _complete(self, prompt: TokenPrompt, spec: SamplingSpec, seed: int | None) -> _Choice:
        """Run one sequence. Raises RequestError if refused, else EngineUnavailable; neither contains the address."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._ask(prompt, spec, seed)
            except NoResponse as error:
                if attempt == ATTEMPTS:
                    raise self._lost(error) from error
            except RemoteError as error:
                if error.status in (400, 422):
                    raise RequestError(f"policy '{self._name}' refuses the request: {error.detail}") from error
                raise self._lost(error) from error
        raise AssertionError

    def _lost(self, error: RemoteError) -> EngineUnavailable:
        log.warning("policy '%s': %s", self._name, error)
        return EngineUnavailable(f"policy '{self._name}': its server {error.fault}")

    async def _ask(self, prompt: TokenPrompt, spec: SamplingSpec, seed: int | None) -> _Choice:
        body = {"model": self._model, "prompt": list(prompt.token_ids), **body_of(spec), "return_token_ids": True}
        if seed is not None:
            body["seed"] = seed
        content = await self._remote.exchange(self._spec.url, "POST", "/v1/completions", body)
        (choice,) = parse_body(self._spec.url, _Completion, content).choices
        return choice


class _RemoteSequence:
    """One completion request: a single delta, at its end."""

    def __init__(self, index: int, complete: Callable[[], Coroutine[Any, Any, _Choice]]) -> None:
        self._index = index
        self._complete = complete
        self._task: asyncio.Task[_Choice] | None = None

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        task = self._task = asyncio.create_task(self._complete())
        try:
            await asyncio.wait([task])
            if task.cancelled():
                yield Delta(self._index, "", (), "abort")
                return
            choice = task.result()
            yield Delta(self._index, choice.text, tuple(choice.token_ids), choice.finish_reason, choice.stop_reason)
        finally:
            self.give_up()

    def give_up(self) -> Sequence[str]:
        """Close the connection, at which the server gives the sequence up."""
        if self._task is not None and not self._task.cancelling():  # twice would interrupt the closing
            self._task.cancel()
        return ()
