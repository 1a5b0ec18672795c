"""Sampling fields by vLLM's names: for its SamplingParams and its HTTP requests. Imports no vLLM."""

from guiderail.guides.core.types import SamplingSpec


def sampling_fields(spec: SamplingSpec) -> dict[str, object]:
    """Return the fields that vLLM's SamplingParams and its HTTP requests have in common."""
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
        "bad_words": list(spec.bad_words),
        "allowed_token_ids": None if spec.allowed_token_ids is None else list(spec.allowed_token_ids),
    }


def body_of(spec: SamplingSpec) -> dict[str, object]:
    """Return the sampling fields of a vLLM completion request."""
    body = sampling_fields(spec)
    if spec.logit_bias:
        body["logit_bias"] = {str(token): value for token, value in spec.logit_bias.items()}
    if spec.json_schema is not None:
        body["structured_outputs"] = {"json": dict(spec.json_schema)}
    return body
