"""Between our sampling parameters and log-probabilities and vLLM's. Imports vLLM only inside functions."""

from collections.abc import Sequence
from typing import Any

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import SamplingSpec, TokenLogprob

FORCED = "guiderail_forced"  # key of SamplingParams.extra_args; see vllm_processors.py
PRIORITY = "guiderail_priority"  # likewise: the request's priority
ROWS = 4096  # between the priorities of two requests in the engine: more than rows of one


def refusal(error: Exception, params: Any) -> RequestError:
    """vLLM's objection to a request; with a schema it is nearly always the grammar made of that."""
    return RequestError(str(error), "response_format" if params.structured_outputs is not None else None)


def sampling_fields(spec: SamplingSpec) -> dict[str, Any]:
    """What vLLM's SamplingParams and its HTTP requests name alike."""
    return {
        "max_tokens": spec.max_tokens,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k,
        "min_p": spec.min_p,
        "stop": list(spec.stop),
        "stop_token_ids": list(spec.stop_token_ids),
        "include_stop_str_in_output": spec.include_stop_str_in_output,
        "min_tokens": spec.min_tokens,
        "ignore_eos": spec.ignore_eos,
        "presence_penalty": spec.presence_penalty,
        "frequency_penalty": spec.frequency_penalty,
        "repetition_penalty": spec.repetition_penalty,
        "skip_special_tokens": spec.skip_special_tokens,
    }


def sampling_params(
    spec: SamplingSpec, seed: int | None, extra_args: dict[str, Any] | None = None, *, wide: bool = False
) -> Any:
    """vLLM's SamplingParams for one row; `wide` if others run with it. Raises RequestError for what vLLM refuses."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if spec.priority or wide:
        extra_args = {**(extra_args or {}), PRIORITY: spec.priority * ROWS + wide}
    structured = None
    if spec.json_schema is not None:
        structured = StructuredOutputsParams(json=dict(spec.json_schema))
    try:
        return SamplingParams(
            n=1,
            **sampling_fields(spec),
            seed=seed,
            logit_bias=dict(spec.logit_bias) or None,
            logprobs=spec.logprobs,
            structured_outputs=structured,
            extra_args=extra_args,
            output_kind=RequestOutputKind.DELTA if spec.stream else RequestOutputKind.FINAL_ONLY,
        )
    except ValueError as error:
        raise RequestError(str(error)) from error


def row_priority(params: Any, row: int) -> int:
    """A row's place among those that wait in the engine: the request's priority, then single rows, then rows in order.

    So plain chats go before wide requests, and the first rows of one wide request before the last ones of another.
    """
    return int((params.extra_args or {}).get(PRIORITY, 0)) + row


def forced_params(answer: Sequence[int], v2: bool) -> Any:
    """SamplingParams of a row that decodes exactly `answer`; `v2` names the model runner."""
    from vllm import SamplingParams

    forced: dict[str, Any] = {"trace_decode_token_ids": list(answer)} if v2 else {"extra_args": {FORCED: list(answer)}}
    return SamplingParams(
        max_tokens=len(answer), temperature=0, logprobs=0, ignore_eos=True, detokenize=False, **forced
    )


def token_logprobs(completion: Any) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of a completion's new tokens, likeliest first beside each."""
    rows = []
    for token, entries in zip(completion.token_ids, completion.logprobs or (), strict=True):
        top = sorted(((i, e.logprob) for i, e in entries.items()), key=lambda pair: -pair[1])
        rows.append(TokenLogprob(token, entries[token].logprob, tuple(top)))
    return tuple(rows)
