"""Draw answers from the served model and score them, for many prompts, without HTTP and without a guide.

Answers and scores are kept in a journal (server/offline/journal.py) as they come.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from guiderail.guides.core.errors import GuiderailError, RequestError, RewardFailed, TooLong
from guiderail.guides.core.seeds import Seeds
from guiderail.guides.core.tasks import together
from guiderail.guides.core.types import PROMPT, Answer, Message, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.guides.scoring import RewardTerm
from guiderail.server.offline.journal import Journal
from guiderail.server.state import ServerState

SCORED_AT_ONCE = 64  # answers; a call that goes to the engine must not wait long behind others
SCORE_CALL = 16  # answers in one call, at most


@dataclass(frozen=True, slots=True)
class AnswerPool:
    """Answers to one prompt. `item` is its name in messages, by default "prompt" and its number."""

    messages: tuple[Message, ...]
    prompt: TokenPrompt
    answers: tuple[Answer, ...]
    item: str = ""


def tokens_of(state: ServerState, messages: Sequence[Message]) -> TokenPrompt:
    """The prompt as a request would have it: a conversation in the chat template, a raw prompt as it is.

    Raises RequestError if the template rejects it.
    """
    if messages[0].role == PROMPT:
        return TokenPrompt(tuple(state.renderer.encode_prompt(messages[0].content)))
    return state.renderer.render(messages)


async def draw(
    state: ServerState,
    prompts: Sequence[Sequence[Message]],
    n: int,
    sampling: SamplingSpec,
    journal: Journal | None = None,
) -> list[AnswerPool]:
    """n answers to each prompt from the served model, in the order of the prompts, with a progress bar.

    With a seed, each prompt's answers are seeded as the answers of one request are (guides/core/seeds.py). The
    engine is given enough prompts at once to fill it twice. Raises RequestError for a prompt that the context has no
    room for, before anything is drawn, and EngineUnavailable if the engine is lost.
    """
    kept = journal or Journal()
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
            keys = [f"answer {index}.{number}" for number in range(n)]
            missing = [number for number, key in enumerate(keys) if key not in kept]
            bar.update(n - len(missing))
            if missing:
                async with at_once:
                    await generate(index, missing, keys)
            answers = tuple(Answer(text, tuple(ids)) for text, ids in (kept[key] for key in keys))
            return AnswerPool(tuple(prompts[index]), rendered[index], answers)

        async def generate(index: int, missing: Sequence[int], keys: Sequence[str]) -> None:
            stream, spec = Seeds(sampling.seed, index).stream(n), replace(sampling, stream=False)
            seeds = [stream[number] for number in missing]
            texts: list[str] = [""] * len(missing)
            ids: list[tuple[int, ...]] = [()] * len(missing)
            async with state.engine.generate([rendered[index]] * len(missing), spec, seeds=seeds) as rollouts:
                async for delta in rollouts:
                    texts[delta.row] += delta.text
                    ids[delta.row] += delta.token_ids
                    if delta.finish_reason is not None:
                        kept.keep(keys[missing[delta.row]], [texts[delta.row], ids[delta.row]])
                        bar.update()

        return await together(one(index) for index in range(len(prompts)))


async def score(
    state: ServerState, pools: Sequence[AnswerPool], term: RewardTerm, journal: Journal | None = None
) -> list[tuple[float, ...] | None]:
    """The reward's raw values, one tuple for each pool, with a progress bar; None for a pool that the reward fails on.

    A pool that fails is dropped as a whole (see Journal.fail, which may raise). Raises EngineUnavailable (EngineNeeded)
    if the reward needs an engine that is not there.
    """
    kept = journal or Journal()
    sizes = [len(pool.answers) for pool in pools]
    at_once = asyncio.Semaphore(SCORED_AT_ONCE // min(SCORE_CALL, max(sizes, default=1)))
    with tqdm(total=sum(sizes), unit="answer", desc=f"scoring {term.label}", disable=None) as bar:

        async def call(index: int, start: int) -> None:
            pool = pools[index]
            answers = pool.answers[start : start + SCORE_CALL]
            key = f"{term.label} {index}.{start}"
            if key not in kept:
                async with at_once:
                    group = ScoreGroup(pool.messages, pool.prompt, answers, term.params)
                    kept.keep(key, (await state.scorer.score(term.name, group)).values)
            bar.update(len(answers))

        async def one(index: int) -> tuple[float, ...] | None:
            starts = range(0, sizes[index], SCORE_CALL)
            try:
                await together(call(index, start) for start in starts)
            except (RewardFailed, TooLong) as error:
                kept.fail(pools[index].item or f"prompt {index + 1}", error)
                return None
            return tuple(value for start in starts for value in kept[f"{term.label} {index}.{start}"])

        return await together(one(index) for index in range(len(pools)))


async def score_all(
    state: ServerState, pools: Sequence[AnswerPool], terms: Sequence[RewardTerm], journal: Journal | None = None
) -> tuple[list[int], list[list[tuple[float, ...]]]]:
    """Indices of the pools that no reward fails on, and each reward's values of these. Raises the errors of
    `score`, and GuiderailError if there is no such pool."""
    kept = journal or Journal()
    columns = [await score(state, pools, term, kept) for term in terms]
    whole = [index for index in range(len(pools)) if all(column[index] is not None for column in columns)]
    if not whole:
        raise GuiderailError("nothing is left: " + next(iter(kept.failed.values()), "no prompts"))
    values = [[each for index in whole if (each := column[index]) is not None] for column in columns]
    return whole, values
