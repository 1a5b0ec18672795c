"""One sequence as a request to an AsyncLLM: its outputs as deltas, vLLM's errors as ours.

Each sequence is a request of its own, so that it can be dropped alone; vLLM's cache shares the prefixes.
"""

from collections.abc import AsyncGenerator, Sequence
from traceback import walk_tb
from typing import Any, TypeGuard

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.types import Delta, TokenLogprob
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.vllm.params import refusal


class VllmRequest:
    """server.engines.sequences.EngineSequence of one request."""

    def __init__(
        self,
        llm: Any,
        monitor: ProcessMonitor,
        request_id: str,
        token_ids: Sequence[int],
        params: Any,
        *,
        index: int = 0,
        lora: Any = None,
        priority: int = 0,
    ) -> None:
        """llm: the AsyncLLM. params: its SamplingParams. index: number of the sequence, which its deltas carry.

        lora: vLLM's LoRARequest. priority: among requests that wait the smallest starts first.
        """
        self._llm = llm
        self._monitor = monitor
        self._id = request_id
        self._token_ids = token_ids
        self._params = params
        self._index = index
        self._lora = lora
        self._priority = priority

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield what the sequence gains. Raises EngineUnavailable, or RequestError for parameters that vLLM refuses."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt, params = tokens_input(list(self._token_ids)), self._params
        try:
            async for output in self._llm.generate(
                prompt, params, self._id, lora_request=self._lora, priority=self._priority
            ):
                completion = output.outputs[0]
                if completion.finish_reason == "error" and params.structured_outputs is not None:
                    raise RequestError("the engine cannot follow the grammar made of the schema", "response_format")
                yield Delta(
                    self._index,
                    completion.text,
                    tuple(completion.token_ids),
                    completion.finish_reason,
                    completion.stop_reason,
                    token_logprobs(completion) if params.logprobs is not None else None,
                )
        except EngineDeadError as error:
            raise EngineUnavailable(f"the engine process died: {await self._monitor.cause()}") from error
        except EngineGenerateError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError) or (_on_the_way_in(cause) and not self._llm.errored):
                raise refusal(cause, params) from error
            raise EngineUnavailable(f"the engine failed: {cause!r}") from error
        except (VLLMClientError, ValueError) as error:
            raise refusal(error, params) from error

    def give_up(self) -> Sequence[str]:
        return [self._id]


def token_logprobs(completion: Any) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of a completion's tokens, each with the likeliest alternatives in order."""
    found = []
    for token, entries in zip(completion.token_ids, completion.logprobs or (), strict=True):
        top = sorted(((i, e.logprob) for i, e in entries.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(token, entries[token].logprob, tuple(top)))
    return tuple(found)


def _on_the_way_in(error: BaseException | None) -> TypeGuard[Exception]:
    """Return True if vLLM raised the error before the engine had the request: whatever it is, it is about that."""
    return isinstance(error, Exception) and any(
        frame.f_code.co_name == "add_request" for frame, _ in walk_tb(error.__traceback__)
    )
