"""The implicit reward: log-likelihood ratio of the answer under a policy and a reference.

r(x, y) = beta sum_t [ log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t) ], the reward that DPO shows a policy
pair to stand for, up to a constant of the prompt (Rafailov et al. 2023, arXiv 2305.18290, eq. 5). The sum over
the tokens so far is the value of a partial answer.

`Implicit` takes two policies of the engine, which differ by LoRA adapter, by system message, or by both; the request's
prompter puts either message. `ImplicitOfModels` takes any two causal language models that run beside the engine.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from pydantic import Field

from guiderail.guides.core.errors import RequestError, TooLong
from guiderail.guides.core.interfaces import ScoreResult, Services
from guiderail.guides.core.reward import Reward, next_turn
from guiderail.guides.core.types import PROMPT, Answer, Divisor, Message, Params, ScoreGroup, TokenPrompt
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.models.backend import ModelReward, Text
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder, surely_fits

DEFAULT_MESSAGE = "You are a helpful, polite and honest assistant. You answer clearly and never insult anyone."


class ImplicitParams(Params):
    adapter: str | None = Field(default=None, description="LoRA adapter of the policy; default: served model.")
    system_message: str | None = Field(
        default=DEFAULT_MESSAGE, max_length=8192, description="System message of the policy; null: the request's."
    )
    reference_adapter: str | None = Field(default=None, description="LoRA adapter of the reference.")
    reference_system_message: str | None = Field(
        default=None, max_length=8192, description="System message of the reference; null: the request's."
    )
    per_token: bool = Field(default=False, description="Mean over the answer's tokens instead of their sum.")


class Implicit(Reward[ImplicitParams]):
    """Log-likelihood ratio of the answer under two policies (adapters or system messages) of the engine."""

    Params = ImplicitParams

    batched: ClassVar[bool] = False
    asks_engine: ClassVar[bool] = True

    def __init__(self) -> None:
        self._services: Services | None = None

    async def start(self, services: Services) -> None:
        self._services = services

    def check(self, params: ImplicitParams, services: Services) -> None:
        for field, name in (("adapter", params.adapter), ("reference_adapter", params.reference_adapter)):
            if name is not None and name not in services.adapters:
                known = ", ".join(sorted(services.adapters)) or "none"
                raise ValueError(f"'{field}': no LoRA adapter '{name}'; loaded: {known}")
        policy = (params.adapter, params.system_message)
        if policy == (params.reference_adapter, params.reference_system_message):
            raise ValueError("policy and reference are the same, so the ratio is always 0")

    def room(self, group: ScoreGroup[ImplicitParams]) -> int | None:
        """What the longer one of both prompts leaves of the context. Raises TooLong."""
        services = self._services
        if services is None or not (context := services.context()):
            return None
        longer = max(len(prompt.token_ids) for prompt in _prompts(services, group))
        _fits(context, longer, [len(_ids(services, answer)) for answer in group.answers])
        return context - longer

    async def score(self, groups: Sequence[ScoreGroup[ImplicitParams]]) -> list[ScoreResult]:
        assert self._services is not None
        return [await self._score_group(self._services, group) for group in groups]

    async def _score_group(self, services: Services, group: ScoreGroup[ImplicitParams]) -> ScoreResult:
        params = group.params
        policy, reference = _prompts(services, group)
        answers = [_ids(services, answer) for answer in group.answers]
        if context := services.context():
            _fits(context, max(len(policy.token_ids), len(reference.token_ids)), list(map(len, answers)))
        present = [ids for ids in answers if ids]  # an empty answer has likelihood 1 under any policy
        rows = await services.engine.answer_logprobs(
            [policy] * len(present) + [reference] * len(present), [*present, *present]
        )
        ratios = iter(
            (sum(up) - sum(down)) / (len(up) if params.per_token else 1)
            for up, down in zip(rows[: len(present)], rows[len(present) :], strict=True)
        )
        values = tuple(next(ratios) if ids else 0.0 for ids in answers)
        context = len(policy.token_ids) + len(reference.token_ids)
        return ScoreResult(values, sum(context + 2 * len(ids) for ids in present))


def _fits(context: int, prompt: int, answers: Sequence[int]) -> None:
    """Raise TooLong unless a prompt of so many tokens and the longest of the answers fit a context."""
    longest = max(answers, default=1)
    if prompt + longest > context:
        raise TooLong(
            f"the longer prompt of policy and reference has {prompt} tokens and the answer {longest}; the model's "
            f"context is {context}",
            "messages",
        )


def _ids(services: Services, answer: Answer) -> tuple[int, ...]:
    return answer.token_ids or tuple(services.renderer.encode(answer.text, plain=True))


def _prompts(services: Services, group: ScoreGroup[ImplicitParams]) -> tuple[TokenPrompt, TokenPrompt]:
    """Return the request's prompt under the policy and under the reference."""
    params = group.params
    return (
        _prompt(services, group, params.system_message, params.adapter),
        _prompt(services, group, params.reference_system_message, params.reference_adapter),
    )


def _prompt(services: Services, group: ScoreGroup, system_message: str | None, adapter: str | None) -> TokenPrompt:
    """Return the request's prompt under another system message (which replaces the request's own) and adapter."""
    if system_message is None:
        return TokenPrompt(group.prompt.token_ids, adapter or group.prompt.adapter)
    if group.messages[0].role == PROMPT:
        before = services.renderer.encode(system_message + "\n\n", add_special_tokens=True, plain=True)
        text = services.renderer.encode_prompt(group.messages[0].content, opens=False)
        return TokenPrompt((*before, *text), adapter or group.prompt.adapter)
    turns = [Message("system", system_message), *(m for m in group.messages if m.role != "system")]
    prompt = group.render(turns) if group.render is not None else next_turn(services.renderer, turns)
    return TokenPrompt(prompt.token_ids, adapter or group.prompt.adapter)


class LanguageModel(Protocol):
    """A causal language model beside the engine, with its chat template and tokenizer."""

    conversations: ConversationEncoder

    async def logprobs(self, texts: Sequence[Text]) -> list[list[float]]:
        """Return the log-probability of each token of each text's answer."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadedPair:
    """Policy and reference, the tokens of the longest text that both read, and their counts together."""

    policy: LanguageModel
    reference: LanguageModel
    longest: int
    stats: RunnerStats


class ImplicitOfModelsParams(Params):
    beta: Divisor = Field(default=1.0, description="Factor of the ratio, as the policy was trained with.")
    per_token: bool = Field(default=False, description="Mean over the answer's tokens instead of their sum.")


class ImplicitOfModels(ModelReward[ImplicitOfModelsParams]):
    """Log-likelihood ratio of the answer under two language models, policy and reference (DPO's implicit reward)."""

    Params = ImplicitOfModelsParams

    def __init__(self, load: Callable[[], Awaitable[LoadedPair]], identity: Callable[[], str]) -> None:
        """load: called once, by `start`. identity: tells the weights apart from others, once they are loaded."""
        self._load, self._identity = load, identity
        self._pair: LoadedPair | None = None

    async def start(self, services: Services) -> None:
        self._pair = await self._load()

    @property
    def stats(self) -> RunnerStats | None:
        """Counts of both models, once they are loaded."""
        return self._pair.stats if self._pair is not None else None

    def room(self, group: ScoreGroup[ImplicitOfModelsParams]) -> int | None:
        """Any, in tokens that are not the models'. Raises TooLong for what is longer than they read already."""
        pair = self._pair
        if pair is None or surely_fits(group.messages, group.answers, pair.longest):
            return None
        asked = [(group, answer) for answer in group.answers or (Answer("", partial=True),)]
        for model in (pair.policy, pair.reference):
            _texts(model, asked, pair.longest)
        return None

    def revision(self) -> str:
        return self._identity()

    async def close(self) -> None:
        """Free the models."""
        if self._pair is not None:
            await self._pair.policy.close()
            await self._pair.reference.close()

    async def score(self, groups: Sequence[ScoreGroup[ImplicitOfModelsParams]]) -> list[ScoreResult]:
        """Raises RequestError for a conversation that a model's template refuses or that is longer than both read.

        An answer that is whole counts with the token that ends its turn, one that goes on does not.
        """
        assert self._pair is not None
        asked = [(group, answer) for group in groups for answer in group.answers]
        models = (self._pair.policy, self._pair.reference)
        texts = [await asyncio.to_thread(_texts, each, asked, self._pair.longest) for each in models]
        policy, reference = [await each.logprobs(found) for each, found in zip(models, texts, strict=True)]
        values = iter(
            group.params.beta * (math.fsum(up) - math.fsum(down)) / (max(1, len(up)) if group.params.per_token else 1)
            for (group, _), up, down in zip(asked, policy, reference, strict=True)
        )
        tokens = iter(len(ours) + len(theirs) for (ours, _), (theirs, _) in zip(*texts, strict=True))
        return [
            ScoreResult(tuple(next(values) for _ in group.answers), sum(next(tokens) for _ in group.answers))
            for group in groups
        ]


def _texts(model: LanguageModel, asked: Sequence[tuple[ScoreGroup, Answer]], longest: int) -> list[Text]:
    """Return conversation and answer as a model reads them. Raises RequestError."""
    halves = [model.conversations.divide(g.messages, a.text, partial=a.partial) for g, a in asked]
    ids = model.conversations.encode([half for both in halves for half in both])
    texts: list[Text] = []
    for prompt, answer in zip(ids[::2], ids[1::2], strict=True):
        if not prompt:
            raise RequestError("the conversation has no token that the answer could go on from", "messages")
        if (count := len(prompt) + len(answer)) > longest:
            raise TooLong(f"conversation and answer have {count} tokens; both models read {longest}", "messages")
        texts.append(([*prompt, *answer], len(prompt)))
    return texts
