"""Requests to vLLM over a scripted AsyncLLM: outputs become deltas, its errors ours, and little lies between."""

import inspect
import sys
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.types import Delta, SamplingSpec, TokenLogprob
from guiderail.server.engines.process_monitor import ProcessMonitor
from guiderail.server.engines.sequences import EngineRollouts
from guiderail.server.engines.vllm.params import sampling_params
from guiderail.server.engines.vllm.request import VllmRequest


def output(*tokens: int, reason: str | None = None, **more: Any) -> Any:
    completion = {"token_ids": tokens, "text": "x" * len(tokens), "stop_reason": None, "logprobs": None}
    return SimpleNamespace(outputs=[SimpleNamespace(**completion, finish_reason=reason, **more)])


class ScriptedLlm:
    """Yields the outputs of its script, raises the errors in it; notes the frames between it and its reader."""

    errored = False

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.asked: list[Any] = []
        self.between: list[str] = []

    async def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncGenerator[Any, None]:
        self.asked.append((prompt["prompt_token_ids"], request_id, more))
        for each in self.script:
            frame: Any = sys._getframe().f_back
            self.between = []
            while not frame.f_code.co_name.startswith(("test_", "read")):
                self.between += [frame.f_code.co_qualname] if frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR else []
                frame = frame.f_back
            if isinstance(each, BaseException):
                raise each
            yield each


def request(llm: ScriptedLlm, index: int = 0, *, schema: object = None, logprobs: int | None = None) -> VllmRequest:
    params = SimpleNamespace(logprobs=logprobs, structured_outputs=schema)
    return VllmRequest(llm, ProcessMonitor(), f"r{index}", (1, 2), params, index=index, lora="lora", priority=7)


async def read(*sequences: VllmRequest) -> list[Delta]:
    async with EngineRollouts(sequences, None) as rollouts:
        return [delta async for delta in rollouts]


async def test_outputs_become_deltas() -> None:
    entries = {5: SimpleNamespace(logprob=-0.5), 6: SimpleNamespace(logprob=-0.25)}
    first = output(5)
    first.outputs[0].logprobs = [entries]
    last = output(reason="stop")
    llm = ScriptedLlm(first, last)
    assert await read(request(llm, logprobs=1)) == [
        Delta(0, "x", (5,), None, None, (TokenLogprob(5, -0.5, ((6, -0.25), (5, -0.5))),)),
        Delta(0, "", (), "stop", None, ()),
    ]
    assert llm.asked == [([1, 2], "r0", {"lora_request": "lora", "priority": 7})]
    assert list(request(llm).give_up()) == ["r0"]


async def test_two_generators_lie_between_vllm_and_a_guide() -> None:
    llm = ScriptedLlm(output(5), output(6, reason="length"))
    assert len(await read(request(llm))) == 2
    assert llm.between == ["VllmRequest.deltas", "EngineRollouts.__aiter__"]


@pytest.mark.parametrize("reason", [None, "error"])
async def test_an_end_that_is_none_is_an_error(reason: str | None) -> None:
    with pytest.raises(EngineUnavailable, match="ended a sequence with"):
        await read(request(ScriptedLlm(output(5, reason=reason))))


async def test_a_sequence_that_its_schema_ends_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="made of the schema") as refused:
        await read(request(ScriptedLlm(output(5), output(reason="error")), schema={}))
    assert refused.value.param == "response_format"


def wrapped(cause: Exception) -> EngineGenerateError:
    error = EngineGenerateError()
    error.__cause__ = cause
    return error


def on_the_way_in(cause: Exception) -> EngineGenerateError:
    """As AsyncLLM.generate wraps what its add_request raises."""

    def add_request() -> None:
        raise cause

    try:
        add_request()
    except Exception as error:
        return wrapped(error)
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "schema", "kind", "param", "said"),
    [
        (ValueError("too long"), None, RequestError, None, "too long"),
        (wrapped(ValueError("bad grammar")), {"a": 1}, RequestError, "response_format", "bad grammar"),
        (
            VLLMValidationError("no", parameter="logit_bias", value=[9] * 10**6),
            None,
            RequestError,
            "logit_bias",
            "^no$",
        ),
        (VLLMValidationError("no", parameter="min_tokens"), {"a": 1}, RequestError, "min_tokens", "^no$"),
        (VLLMValidationError("top_k must be small, got 9"), None, RequestError, "top_k", "must be small"),
        (VLLMValidationError("the grammar is too deep"), {"a": 1}, RequestError, "response_format", "too deep"),
        (on_the_way_in(RecursionError("deep")), {"a": 1}, RequestError, "response_format", "deep"),
        (on_the_way_in(OverflowError("wide")), None, RequestError, None, "wide"),
        (on_the_way_in(KeyError()), None, RequestError, None, "KeyError"),
        (wrapped(KeyError("lost")), None, EngineUnavailable, None, r"the engine failed: KeyError\('lost'\)"),
        (EngineDeadError(), None, EngineUnavailable, None, "the engine process died: it ended and said nothing"),
    ],
)
async def test_errors_of_vllm_become_ours(
    error: Exception,
    schema: object,
    kind: type[Exception],
    param: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("guiderail.server.engines.process_monitor.PATIENCE_S", 0.01)
    with pytest.raises(kind, match=said) as raised:
        await read(request(ScriptedLlm(error), schema=schema))
    if isinstance(raised.value, RequestError):
        assert raised.value.param == param


async def test_what_fails_on_the_way_into_a_dead_engine_is_not_the_requests_fault() -> None:
    llm = ScriptedLlm(on_the_way_in(OSError("the socket is closed")))
    llm.errored = True
    with pytest.raises(EngineUnavailable, match="the socket is closed"):
        await read(request(llm))


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 2.5}, "temperature"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"), ({"min_p": 2.0}, "min_p"), ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"min_tokens": 9}, "min_tokens"), ({"logprobs": -2}, "logprobs"), ({"stop": ("",)}, "stop"),
        ({"json_schema": {}}, None),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_vllm_refuses_are_named(more: dict[str, Any], param: str | None) -> None:
    spec = SamplingSpec(4, **more)
    if param is None:
        assert sampling_params(spec, None).structured_outputs is not None
        return
    with pytest.raises(RequestError) as refused:
        sampling_params(spec, None)
    assert refused.value.param == param
