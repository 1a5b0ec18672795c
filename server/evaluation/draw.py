"""Draws answers from the served model and scores them, for many prompts, without HTTP and without a guide."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from guiderail.guides.errors import RequestError
from guiderail.guides.pipeline import RewardTerm
from guiderail.guides.seeds import Seeds
from guiderail.guides.tasks import together
from guiderail.guides.types import PROMPT, Answer, Message, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.server.state import ServerState

SCORED_AT_ONCE = 64  # answers; a call that goes to the engine must not wait out its time limit behind others
SCORE_CALL = 16  # answers of one call at most


@dataclass(frozen=True, slots=True)
class AnswerPool:
    """Answers to one prompt."""

    messages: tuple[Message, ...]
    prompt: TokenPrompt
    answers: tuple[Answer, ...]


def tokens_of(state: ServerState, messages: Sequence[Message]) -> TokenPrompt:
    """The prompt as a request would have it: a conversation in the chat template, a raw prompt as it is.

    Raises RequestError if the template refuses it.
    """
    if messages[0].role == PROMPT:
        return TokenPrompt(tuple(state.renderer.encode(messages[0].content, add_special_tokens=True)))
    return state.renderer.render(messages)


async def draw(
    state: ServerState, prompts: Sequence[Sequence[Message]], n: int, sampling: SamplingSpec
) -> list[AnswerPool]:
    """n answers to each prompt from the served model, in the order of the prompts, with a progress bar.

    With a seed, each prompt's answers are seeded as the answers of one request are (guides/seeds.py). As many
    prompts are in the engine at once as fill it twice. Raises RequestError for a prompt that the context has no
    room for, before anything is drawn, and EngineUnavailable if the engine is lost.
    """
    rendered = [tokens_of(state, messages) for messages in prompts]
    for index, prompt in enumerate(rendered, 1):
        room = state.engine.max_model_len - len(prompt.token_ids)
        if sampling.max_tokens > room:
            raise RequestError(
                f"prompt {index} of {len(prompts)} has {len(prompt.token_ids)} tokens, which leaves {room} of the "
                f"model's context; {sampling.max_tokens} are asked for"
            )
    at_once = asyncio.Semaphore(max(2, 2 * state.settings.rows // n))
    with tqdm(total=n * len(prompts), unit="answer", desc="drawing", disable=None) as bar:

        async def one(index: int) -> AnswerPool:
            seeds, spec = Seeds(sampling.seed, index).stream(n), replace(sampling, stream=False)
            texts: list[str] = [""] * n
            ids: list[tuple[int, ...]] = [()] * n
            async with at_once, state.engine.generate([rendered[index]] * n, spec, seeds=seeds) as rollouts:
                async for delta in rollouts:
                    texts[delta.row] += delta.text
                    ids[delta.row] += delta.token_ids
                    bar.update(delta.finish_reason is not None)
            return AnswerPool(tuple(prompts[index]), rendered[index], tuple(map(Answer, texts, ids)))

        return await together(one(index) for index in range(len(prompts)))


async def score(state: ServerState, pools: Sequence[AnswerPool], term: RewardTerm) -> list[tuple[float, ...]]:
    """The reward's raw values, one tuple for each pool, with a progress bar.

    Raises RewardFailed if the reward fails, and EngineUnavailable (EngineNeeded) if it asks for an engine that
    is not there.
    """
    sizes = [len(pool.answers) for pool in pools]
    at_once = asyncio.Semaphore(SCORED_AT_ONCE // min(SCORE_CALL, max(sizes, default=1)))
    with tqdm(total=sum(sizes), unit="answer", desc=f"scoring {term.label}", disable=None) as bar:

        async def call(pool: AnswerPool, answers: tuple[Answer, ...]) -> tuple[float, ...]:
            async with at_once:
                group = ScoreGroup(pool.messages, pool.prompt, answers, term.params)
                result = await state.scorer.score(term.name, group)
            bar.update(len(answers))
            return result.values

        async def one(pool: AnswerPool) -> tuple[float, ...]:
            starts = range(0, len(pool.answers), SCORE_CALL)
            parts = await together(call(pool, pool.answers[start : start + SCORE_CALL]) for start in starts)
            return tuple(value for part in parts for value in part)

        return await together(one(pool) for pool in pools)
