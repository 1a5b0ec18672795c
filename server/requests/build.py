"""From a wire request to a Request: rendered, checked against the model and the operator's limits, with its cost."""

import uuid
from dataclasses import dataclass, replace
from functools import partial

from guiderail.guides.core.context import Context
from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.metering import Limits, Spend
from guiderail.guides.core.types import PROMPT, Message, TokenPrompt
from guiderail.guides.prompters import Template
from guiderail.guides.scoring.pipeline import Judging
from guiderail.server.openai_errors import ApiError, bad_request
from guiderail.server.requests.admission import Work
from guiderail.server.requests.clients import NOBODY, Client
from guiderail.server.requests.lengths import room
from guiderail.server.requests.resolve import Alignment
from guiderail.server.requests.sampling_fields import refuse_unkept, sampling_spec
from guiderail.server.requests.schemas import ChatRequest, CompletionRequest, SamplingFields
from guiderail.server.requests.specs import read_alignment
from guiderail.server.state import ServerState

# Of a deadline, what is kept for the end of work and the way of the answer: this share, at most so many seconds.
REPLY_SHARE, REPLY_S = 0.05, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Work):
    """A request for answers, ready to run: one Context an answer."""

    model: str
    alignment: Alignment
    contexts: tuple[Context, ...]
    system_fingerprint: str
    ignored: tuple[str, ...]
    return_token_ids: bool


def chat(state: ServerState, request: ChatRequest, arrived: float, client: Client = NOBODY) -> Request:
    """Check and render a chat request that came at `arrived` (time.monotonic()). Raises ApiError or RequestError."""
    model, adapter, profile = _model(state, request.model)
    alignment = state.resolver.resolve(read_alignment(request.alignment), profile)
    messages = tuple(m.message for m in request.messages)
    prompt = alignment.prompter.render(
        messages,
        state.renderer,
        add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
        continue_final_message=request.continue_final_message,
    )
    prompts = [(messages, TokenPrompt(prompt.token_ids, adapter))]
    return _request(state, request, model, alignment, prompts, arrived, client)


def completion(state: ServerState, request: CompletionRequest, arrived: float, client: Client = NOBODY) -> Request:
    """Check and tokenize a completion request; see chat. Raises ApiError or RequestError."""
    model, adapter, profile = _model(state, request.model)
    alignment = state.resolver.resolve(read_alignment(request.alignment), profile)
    if not isinstance(alignment.prompter, Template):
        raise bad_request("a text completion is its own prompt: prompters are for chats", "alignment.prompter")
    prompts: list[tuple[tuple[Message, ...], TokenPrompt]] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            ids, text = state.renderer.encode_prompt(prompt), prompt
        else:
            _room(state, len(prompt), "prompt")
            ids, text = prompt, state.renderer.decode(_in_vocabulary(state, prompt, "prompt"))
        if not ids:
            raise bad_request("'prompt' is empty", "prompt")
        prompts.append(((Message(PROMPT, text),), TokenPrompt(tuple(ids), adapter)))
    return _request(state, request, model, alignment, prompts, arrived, client)


def _request(
    state: ServerState,
    request: ChatRequest | CompletionRequest,
    model: str,
    alignment: Alignment,
    prompts: list[tuple[tuple[Message, ...], TokenPrompt]],
    arrived: float,
    client: Client,
) -> Request:
    _check(state, request, alignment, len(prompts))
    prompts = [(messages, _truncated(state, request, prompt)) for messages, prompt in prompts]
    within = alignment.budget.deadline_s
    deadline = None if within is None else arrived + within - min(REPLY_SHARE * within, REPLY_S)
    spend = Spend(prompt_tokens=sum(len(prompt.token_ids) for _, prompt in prompts), started=arrived)
    bounds, request_id = Limits(deadline, alignment.budget.max_tokens_generated), uuid.uuid4().hex
    asked = Judging(alignment.rewards, alignment.combine, alignment.selection, alignment.calibration)
    contexts: list[Context] = []
    tokens = 0
    for messages, prompt in prompts:
        max_tokens = _max_tokens(state, request, len(prompt.token_ids))
        dialogue = Dialogue(
            messages=messages,
            prompt=prompt,
            sampling=sampling_spec(request, max_tokens, alignment.prompter.stops),
            renderer=state.renderer,
            model_name=state.settings.model_name,
            prompter=alignment.prompter,
            cleaner=partial(alignment.prompter.cleaner, messages[-1].content if _goes_on(request) else ""),
            continues=_goes_on(request),
        )
        max_tokens = _readable(request, max_tokens, room(state.rewards, alignment.rewards, dialogue))
        if request.min_tokens > max_tokens:
            raise bad_request(f"'min_tokens' must not exceed max_tokens, which is {max_tokens}", "min_tokens")
        dialogue = replace(dialogue, sampling=replace(dialogue.sampling, max_tokens=max_tokens))
        contexts += [
            Context.of(
                dialogue, asked, state.engine, state.scorers,
                limits=bounds, spend=spend, request=request_id, answer=len(contexts) + choice,
            )
            for choice in range(request.n)
        ]  # fmt: skip
        tokens += request.n * alignment.guide.cost(max_tokens) + asked.draws * max_tokens
    return Request(
        label=alignment.guide_name,
        spend=spend,
        rows=len(contexts) * alignment.guide.rows(),
        tokens=tokens,
        client=client,
        priority=request.priority,
        deadline=deadline,
        model=model,
        alignment=alignment,
        contexts=tuple(contexts),
        system_fingerprint=state.system_fingerprint,
        ignored=request.ignored,
        return_token_ids=request.return_token_ids,
    )


def _check(state: ServerState, request: ChatRequest | CompletionRequest, alignment: Alignment, prompts: int) -> None:
    """Raise ApiError (400) for what the operator's limits, the guide or the model do not allow."""
    limits = state.settings.limits
    if request.n > limits.max_n:
        raise bad_request(f"'n' is {request.n}; this server allows at most {limits.max_n}", "n")
    if request.priority < limits.min_priority:
        raise bad_request(f"'priority' must be at least {limits.min_priority} on this server", "priority")
    candidates = request.n * prompts * alignment.guide.candidates()
    if candidates > limits.max_candidates:
        raise bad_request(
            f"{request.n} x {prompts} answers of {alignment.guide.candidates()} candidates are {candidates} "
            f"candidates; this server allows at most {limits.max_candidates} per request",
            "alignment.guide" if alignment.guide.candidates() > 1 else "n",
        )
    refuse_unkept(alignment.guide_name, alignment.guide, request)
    logprobs = request.num_logprobs
    if logprobs is not None and logprobs > state.engine.max_logprobs:
        field = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
        raise bad_request(f"'{field}' is {logprobs}; at most {state.engine.max_logprobs} are served", field)
    _in_vocabulary(state, list(request.logit_bias or ()), "logit_bias")
    _in_vocabulary(state, request.stop_token_ids, "stop_token_ids")
    _in_vocabulary(state, request.allowed_token_ids or [], "allowed_token_ids")


def _truncated(state: ServerState, request: ChatRequest | CompletionRequest, prompt: TokenPrompt) -> TokenPrompt:
    """Return the prompt's last `truncate_prompt_tokens` tokens; -1 is all that the context has room for."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep < 1:
        keep = max(1, state.engine.max_model_len - (request.token_limit or request.default_tokens or 1))
    return replace(prompt, token_ids=prompt.token_ids[-keep:])


def _goes_on(request: SamplingFields) -> bool:
    """Return True if the answer continues the last message."""
    return isinstance(request, ChatRequest) and request.continue_final_message


def _model(state: ServerState, name: str | None) -> tuple[str, str | None, str | None]:
    """Split a model name into (name to report, adapter, profile). Raises ApiError 404 if there is none such."""
    settings = state.settings
    if name is None:
        return settings.model_name, None, None
    base, at, profile = name.rpartition("@")
    if not at or profile not in state.resolver.profile_names:
        base, profile = name, ""
    if base != settings.model_name and base not in settings.lora:
        known = ", ".join([settings.model_name, *settings.lora])
        profiles = ", ".join(state.resolver.profile_names) or "none"
        raise ApiError(
            404, f"no model '{name}'; served: {known}; profiles for a suffix @name: {profiles}",
            param="model", code="model_not_found",
        )  # fmt: skip
    return name, base if base in settings.lora else None, profile or None


def _max_tokens(state: ServerState, request: ChatRequest | CompletionRequest, prompt_len: int) -> int:
    asked = request.token_limit
    context, allowed = state.engine.max_model_len, state.settings.limits.max_tokens
    room = _room(state, prompt_len, "messages" if isinstance(request, ChatRequest) else "prompt")
    if asked is None:
        return min(room, allowed or room, request.default_tokens or room)
    if asked > room:
        raise bad_request(
            f"'max_tokens' is {asked}; the prompt's {prompt_len} tokens leave {room} of the context of {context}",
            "max_tokens",
            "context_length_exceeded",
        )
    if allowed is not None and asked > allowed:
        raise bad_request(f"'max_tokens' is {asked}; this server allows at most {allowed}", "max_tokens")
    return asked


def _room(state: ServerState, prompt_len: int, field: str) -> int:
    """Return the tokens that a prompt leaves of the context. Raises ApiError (400) if there is none."""
    context = state.engine.max_model_len
    if prompt_len >= context:
        raise bad_request(
            f"the prompt has {prompt_len} tokens; the model's context is {context}, one of which must be left",
            field,
            "context_length_exceeded",
        )
    return context - prompt_len


def _readable(request: ChatRequest | CompletionRequest, max_tokens: int, room: tuple[int, str] | None) -> int:
    """Return the tokens that an answer may have for all rewards to read it. Raises ApiError (400)."""
    if room is None or max_tokens <= room[0]:
        return max_tokens
    left, reward = room
    if request.token_limit is None and left > 0:
        return left
    raise bad_request(
        f"'max_tokens' is {max_tokens}; beside what else reward '{reward}' reads, an answer may have {left} tokens",
        "max_tokens",
        "context_length_exceeded",
    )


def _in_vocabulary(state: ServerState, token_ids: list[int], field: str) -> list[int]:
    for token in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token < state.engine.vocab_size:
            raise bad_request(f"'{field}': token id {token} is outside 0..{state.engine.vocab_size - 1}", field)
    return token_ids
