"""A policy on another vLLM server: continues token-id prompts over HTTP, for guides that roll out a baseline.

The wire format is vLLM's `POST /v1/completions` with token ids in (`prompt`) and out (`return_token_ids`). Each row is
a request of its own, so that it has its own seed and can be dropped alone: closing the connection frees it there.
Token ids mean the same here and there only if the tokenizers agree, so that is checked at the start.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.guide import Rollouts
from guiderail.guides.core.reward import Renderer
from guiderail.guides.core.types import Delta, Message, SamplingSpec, TokenPrompt
from guiderail.server.engines.policy_spec import RemotePolicySpec
from guiderail.server.engines.sequences import EngineRollouts
from guiderail.server.engines.vllm.params import sampling_fields
from guiderail.server.remote.remote_client import NoResponse, RemoteClient, RemoteError, ResponseBody, parse_body
from guiderail.server.remote.remote_options import api_key

READ_S = 600.0
IN_FLIGHT = 256  # rows of one policy at a time
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
        """Raises EngineUnavailable if the environment variable of its key is not set."""
        key = api_key(spec.key_env)
        if key == "":
            raise EngineUnavailable(f"policy '{name}': the environment variable {spec.key_env} is not set")
        self._name = name
        self._spec = spec
        self._model = ""
        self._remote = RemoteClient(key, IN_FLIGHT, READ_S)
        self._rows: dict[str, asyncio.Task[_Choice]] = {}  # by request id

    async def start(self, renderer: Renderer) -> None:
        """Asks the server for its model and compares tokenizers. Raises EngineUnavailable with what is wrong."""
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
        params = [(sampling, seed) for seed in seeds or [sampling.seed] * len(prompts)]
        return EngineRollouts(self, prompts, params, deadline)

    async def next_token_logprobs(self, prompts: Sequence[TokenPrompt], top_k: int) -> list[dict[int, float]]:
        raise RequestError(f"policy '{self._name}' is on another server, which gives no log-probabilities")

    async def answer_logprobs(
        self, prompts: Sequence[TokenPrompt], answers: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        raise RequestError(f"policy '{self._name}' is on another server, which gives no log-probabilities")

    async def deltas(self, row: int, prompt: TokenPrompt, params: Any, request_id: str) -> AsyncGenerator[Delta, None]:
        """One delta, at the row's end. A row that is given up ends with finish reason "abort" and nothing else."""
        task = self._rows[request_id] = asyncio.create_task(self._complete(prompt, *params))
        try:
            await asyncio.wait([task])
            if task.cancelled():
                yield Delta(row, "", (), "abort")
                return
            choice = task.result()
            yield Delta(row, choice.text, tuple(choice.token_ids), choice.finish_reason, choice.stop_reason)
        finally:
            task.cancel()
            del self._rows[request_id]

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Closes the connections of these rows, at which the server gives them up."""
        for each in request_ids:
            if each in self._rows:
                self._rows[each].cancel()

    async def close(self) -> None:
        """Closes the connections."""
        await self._remote.close()

    async def _complete(self, prompt: TokenPrompt, spec: SamplingSpec, seed: int | None) -> _Choice:
        """One row. Raises RequestError if the server refuses it, else EngineUnavailable; neither names the address."""
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


def body_of(spec: SamplingSpec) -> dict[str, Any]:
    """The fields of a vLLM completion request that say how to sample."""
    body = sampling_fields(spec)
    if spec.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in spec.logit_bias.items()}
    if spec.json_schema is not None:
        body["structured_outputs"] = {"json": dict(spec.json_schema)}
    return body
