"""The bodies of requests: OpenAI's fields, vLLM's common sampling fields, and `alignment`.

What becomes of a field that is not here says wire.py; fields that change no answer are in hints.py.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from guiderail.guides.core.types import MAX_TEMPERATURE, Message
from guiderail.server.bounded.grammar import grammar_schema
from guiderail.server.bounded.sizes import check_schema_size
from guiderail.server.requests.hints import NO_FUNCTIONS, NO_TOOLS, ONLY_TEXT, Hints
from guiderail.server.requests.wire import Only, Schema, fault


class TextPart(Schema):
    """A part of a message's content: text, or what an assistant said in refusing. Nothing else is served."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: dict[str, object] | None = None

    @model_validator(mode="after")
    def _has_text(self) -> "TextPart":
        if self._said is None:
            raise fault(self.type, "required", "missing")
        return self

    @property
    def said(self) -> str:
        """The part's text."""
        return self._said or ""

    @property
    def _said(self) -> str | None:
        return self.text if self.type == "text" else self.refusal


class ChatMessage(Schema):
    """One turn of the conversation. An assistant's may be as it came, whatever servers and clients put into it.

    What an assistant thought or cited is not put before the model again.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: list[object] | None = None
    parsed: object = None
    alignment: object = None
    audio: Annotated[object, Only(ONLY_TEXT)] = None
    tool_calls: Annotated[object, Only(NO_TOOLS, ([],))] = None
    function_call: Annotated[object, Only(NO_FUNCTIONS)] = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise fault("content", "required", "missing")
        return self

    @property
    def message(self) -> Message:
        """The turn as guides know it; OpenAI's developer role is a system message."""
        return Message("system" if self.role == "developer" else self.role, self.text)

    @property
    def text(self) -> str:
        """The content as one string; of an assistant that refused, what it said instead."""
        if self.content is None:
            return self.refusal or ""
        return self.content if isinstance(self.content, str) else "".join(part.said for part in self.content)


class StreamOptions(Schema):
    """OpenAI's stream_options."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    include_obfuscation: StrictBool = False


class JsonSchemaFormat(Schema):
    """The json_schema part of response_format."""

    name: str = "response"
    description: str | None = None
    schema_: dict[str, object] = Field(alias="schema")
    strict: StrictBool | None = None

    @field_validator("schema_")
    @classmethod
    def _as_the_engine_has_it(cls, schema: dict[str, object]) -> dict[str, object]:
        check_schema_size(schema)
        return grammar_schema(schema)


class ResponseFormat(Schema):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_given(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("json_schema", "must be given exactly when type is 'json_schema'")
        return self


StopText = Annotated[str, Field(min_length=1, max_length=1024)]


class SamplingFields(Hints):
    """The fields that chat and text completions have in common."""

    model: str | None = None
    n: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=64, fail_fast=True)] | None = None
    stop_token_ids: list[int] = Field([], fail_fast=True)
    include_stop_str_in_output: StrictBool = False
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)] = Field([])
    allowed_token_ids: Annotated[list[int], Field(min_length=1)] | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    return_token_ids: StrictBool = False
    response_format: ResponseFormat | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-100, le=100)
    alignment: str | dict[str, object] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "only allowed when stream is true")
        if self.truncate_prompt_tokens == 0:
            raise fault("truncate_prompt_tokens", "must leave a token, or be -1 for what the context has room for")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: int | None = Field(None, ge=0)
    continue_final_message: StrictBool = False
    add_generation_prompt: StrictBool = True

    @model_validator(mode="after")
    def _chat_consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "only allowed when logprobs is true")
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise fault("add_generation_prompt", "cannot be true together with continue_final_message")
            if self.messages[-1].role != "assistant":
                raise fault("continue_final_message", "needs a last message with role 'assistant'")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise fault("max_tokens", "differs from max_completion_tokens; give one of them")
        return self

    default_tokens: ClassVar[int | None] = None  # as much as the context has room for

    @property
    def token_limit(self) -> int | None:
        """The answer's token limit under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Top log-probabilities per token for the engine, None for none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class AnswerFields(Schema):
    """An answer to score; `partial` marks one that goes on."""

    text: str
    partial: StrictBool = False


class ScoreInput(Schema):
    """A conversation and the answers to its last message."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    answers: list[str | AnswerFields] = Field(min_length=1, max_length=1024, fail_fast=True)


class ScoreRequest(Schema):
    """Body of POST /v1/rewards/score; `rewards`, `combine` and `calibration` as in the alignment object.

    `max_tokens` and `temperature` are those of the answers that calibration draws, if any transform needs them.
    """

    inputs: list[ScoreInput] = Field(min_length=1, max_length=1024, fail_fast=True)
    rewards: list[str | dict[str, object]] = Field(min_length=1, fail_fast=True)
    combine: str | dict[str, object] = "sum"
    calibration: dict[str, object] = Field({})
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions: a text, token ids, or a list of either."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0)

    default_tokens: ClassVar[int | None] = 16  # as OpenAI documents for this route

    @property
    def token_limit(self) -> int | None:
        """The answer's token limit, if one is given."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Top log-probabilities per token for the engine, None for none at all."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, always as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
