"""vLLM's SamplingParams from ours. Imports vLLM only inside functions."""

from collections.abc import Sequence
from typing import Any

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.types import SamplingSpec
from guiderail.server.engines.vllm_fields import sampling_fields

FORCED = "guiderail_forced"  # key of SamplingParams.extra_args; see forced_tokens.py
PRIORITY = "guiderail_priority"  # likewise: the request's priority
PRIORITY_STRIDE = 4096  # between the priorities of two requests: more than sequences of one


def sampling_params(
    spec: SamplingSpec, seed: int | None, extra_args: dict[str, Any] | None = None, *, wide: bool = False
) -> Any:
    """Return SamplingParams of one sequence; `wide` if its request has others. Raises RequestError if vLLM refuses."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if spec.priority or wide:
        extra_args = {**(extra_args or {}), PRIORITY: spec.priority * PRIORITY_STRIDE + wide}
    structured = None
    try:
        if spec.json_schema is not None:
            structured = StructuredOutputsParams(json=dict(spec.json_schema))
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
    except (VLLMClientError, ValueError, TypeError, OverflowError) as error:
        raise refusal(error) from error


def refusal(error: Exception, params: Any = None) -> RequestError:
    """Return vLLM's objection to a request as ours, about the field that it names.

    An objection without one to a request with a schema is nearly always to the grammar that is made of that.
    """
    text = str(error.args[0]) if error.args else type(error).__name__
    first = text.partition(" ")[0]
    named = getattr(error, "parameter", None) or (first if first in SamplingSpec.__dataclass_fields__ else None)
    if named is None and params is not None and params.structured_outputs is not None:
        named = "response_format"
    return RequestError(text, named)


def sequence_priority(params: Any, index: int) -> int:
    """Return the place of a request's sequence `index` among those that wait, the smallest first.

    It is the request's priority, then single sequences before others, then their order: plain chats go before wide
    requests, and the first sequences of one wide request before the last ones of another.
    """
    return int((params.extra_args or {}).get(PRIORITY, 0)) + index


def next_token_params(top_k: int) -> Any:
    """Return SamplingParams that give log-probabilities of the `top_k` likeliest next tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0, logprobs=top_k, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def forced_params(answer: Sequence[int], v2: bool) -> Any:
    """Return SamplingParams of a sequence that decodes exactly `answer`, for the V2 or the V1 model runner."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    forced: dict[str, Any] = {"trace_decode_token_ids": list(answer)} if v2 else {"extra_args": {FORCED: list(answer)}}
    return SamplingParams(
        max_tokens=len(answer),
        temperature=0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **forced,
    )
