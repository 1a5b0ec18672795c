"""MixedSequence over scripted members: tokens that they agree on are passed on, others are decoded again."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from guiderail.guides.core.errors import EngineUnavailable, RequestError
from guiderail.guides.core.types import Delta, Mixed, SamplingSpec, TokenLogprob, TokenPrompt
from guiderail.server.engines.vllm.mixture.lockstep import TRIES, MixedSequence
from guiderail.server.engines.vllm.mixture.recipe import Recipe

INDEX = 3
PROMPT = TokenPrompt((1, 2, 3), "a", (Mixed((7,), "b", 0.5), Mixed((8, 9), None, -1.0)))


def letter(token: int) -> str:
    return chr(ord("a") + token % 26)


@dataclass
class ScriptedGroup:
    """Members that emit 10, 11, 12, ... `parts[attempt]` is the place from which role 1 emits something else.

    merge: tokens in a delta of role 0. hold: characters that its text lags behind until the end.
    """

    length: int = 12
    parts: dict[int, int] = field(default_factory=dict)
    merge: int = 1
    hold: int = 0
    fail: Exception | None = None
    early: int | None = None
    max_model_len: int = 100
    started: list[tuple[Recipe, TokenPrompt, SamplingSpec, str]] = field(default_factory=list)
    open: set[str] = field(default_factory=set)

    def member(self, prompt: TokenPrompt, spec: SamplingSpec, recipe: Recipe) -> "Member":
        request_id = f"{recipe.group}.{recipe.role}"
        self.started.append((recipe, prompt, spec, request_id))
        return Member(self, spec, recipe, request_id)

    async def deltas(self, spec: SamplingSpec, recipe: Recipe, request_id: str) -> AsyncGenerator[Delta, None]:
        attempt = int(recipe.group.rpartition(".")[2])
        self.open.add(request_id)
        try:
            if recipe.role == 1 and self.fail is not None:
                raise self.fail
            end = min(self.length, spec.max_tokens)
            text, sent, held = "", 0, []
            for place in range(end):
                await asyncio.sleep(0)
                token = 10 + place
                if place < len(recipe.replay):
                    token = recipe.replay[place]
                elif recipe.role == 1 and place >= self.parts.get(attempt, end):
                    token = 99
                if recipe.role == 1 and self.early is not None and place >= self.early:
                    return
                text += letter(token)
                held.append(token)
                if len(held) == (self.merge if recipe.role == 0 else 1) or place + 1 == end:
                    upto = len(text) if place + 1 == end else max(sent, len(text) - self.hold)
                    logprobs = tuple(TokenLogprob(t, -float(t)) for t in held) if spec.logprobs is not None else None
                    news = text[sent:upto] if recipe.role == 0 else ""
                    yield Delta(INDEX, news, tuple(held), "length" if place + 1 == end else None, None, logprobs)
                    sent, held = upto, []
        finally:
            self.open.discard(request_id)


@dataclass
class Member:
    """One sequence of a ScriptedGroup."""

    group: ScriptedGroup
    spec: SamplingSpec
    recipe: Recipe
    request_id: str

    def deltas(self) -> AsyncGenerator[Delta, None]:
        return self.group.deltas(self.spec, self.recipe, self.request_id)

    def give_up(self) -> list[str]:
        return [self.request_id]


def mixed(engine: ScriptedGroup, prompt: TokenPrompt = PROMPT, seed: int | None = 5, **spec: object) -> MixedSequence:
    sampling = SamplingSpec(**({"max_tokens": 40} | spec))  # type: ignore[arg-type]
    return MixedSequence(INDEX, prompt, sampling, seed, engine.max_model_len, engine.member, "id")


async def read(sequence: MixedSequence) -> tuple[str, list[int], list[float], str | None]:
    text, tokens, logprobs, reason = "", [], [], None
    async for delta in sequence.deltas():
        assert delta.row == INDEX
        assert reason is None
        text, reason = text + delta.text, delta.finish_reason
        tokens += delta.token_ids
        logprobs += [entry.logprob for entry in delta.logprobs or ()]
    return text, tokens, logprobs, reason


WHOLE = [10 + i for i in range(12)]
TEXT = "".join(map(letter, WHOLE))


async def test_tokens_in_step_are_passed_on_as_they_come() -> None:
    engine = ScriptedGroup()
    spec = {
        "temperature": 0.7,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "stop": ("x",),
        "stop_token_ids": (50,),
        "logit_bias": {4: 1.0},
    }
    async with aclosing(mixed(engine, **spec).deltas()) as deltas:
        first = await anext(deltas)
        assert first.token_ids == (10,)
    assert not engine.open
    assert await read(mixed(engine, **spec)) == (TEXT, WHOLE, [], "length")
    (main, one, two) = sorted(engine.started[:3], key=lambda each: each[0].role)
    assert main[0] == Recipe("id.0", 0, 3, [], [0.5, -1.0], 5, 0.7, 4, 0.9, 0.1)
    assert one[0] == Recipe("id.0", 1, 3, [])
    assert [each[1] for each in (one, two)] == [TokenPrompt((7,), "b"), TokenPrompt((8, 9), None)]
    assert (main[2].temperature, main[2].top_k, main[2].top_p, main[2].min_p) == (0, 0, 1, 0), "the processor draws"
    assert main[2].logit_bias == {4: 1.0}
    assert (one[2].stop, one[2].stop_token_ids, one[2].logit_bias) == ((), (50,), {})
    assert len({each[3] for each in engine.started[:3]}) == 3


@pytest.mark.parametrize("merge", [1, 3, 5])
@pytest.mark.parametrize("hold", [0, 2])
@pytest.mark.parametrize("parts", [{0: 0}, {0: 4}, {0: 4, 1: 4, 2: 9}, {0: 11}, {0: 7, 1: 2}], ids=str)
async def test_what_was_taken_is_replayed_and_passed_on_once(parts: dict[int, int], hold: int, merge: int) -> None:
    engine = ScriptedGroup(parts=parts, hold=hold, merge=merge)
    assert await read(mixed(engine, logprobs=0)) == (TEXT, WHOLE, [-float(t) for t in WHOLE], "length")
    replays = [r.replay for r, *_ in engine.started if r.role == 0]
    taken = [0]
    for place in parts.values():
        taken.append(max(taken[-1], place // merge * merge))
    assert [list(replay) for replay in replays] == [WHOLE[:n] for n in taken]
    assert all(r.replay == replays[int(r.group[-1])] for r, *_ in engine.started)
    assert not engine.open


async def test_a_member_that_ends_early_is_out_of_step() -> None:
    with pytest.raises(EngineUnavailable, match=f"{TRIES} times"):
        await read(mixed(ScriptedGroup(early=3)))


async def test_giving_up_frees_all_members() -> None:
    engine = ScriptedGroup(parts=dict.fromkeys(range(TRIES), 6))
    with pytest.raises(EngineUnavailable):
        await read(mixed(engine))
    assert len(engine.started) == TRIES * 3
    assert not engine.open


@pytest.mark.parametrize("error", [EngineUnavailable("gone"), RequestError("refused")])
async def test_a_partners_error_is_raised_as_itself(error: Exception) -> None:
    engine = ScriptedGroup(fail=error)
    with pytest.raises(type(error), match=str(error)):
        await read(mixed(engine))
    assert not engine.open


async def test_an_aborted_mixture_ends_as_aborted() -> None:
    engine = ScriptedGroup()
    sequence = mixed(engine)
    seen = []
    async for delta in sequence.deltas():
        seen.append(delta)
        if len(seen) == 2:
            assert list(sequence.give_up()) == ["id.0.0", "id.0.1", "id.0.2"]
    assert [d.finish_reason for d in seen] == [None, None, "abort"]
    assert not engine.open


async def test_the_longest_prompt_bounds_the_answer() -> None:
    engine = ScriptedGroup(max_model_len=9)
    long = TokenPrompt((1, 2), None, (Mixed((1, 2, 3, 4), None, 1.0),))
    assert (await read(mixed(engine, long)))[1] == WHOLE[:5]
    with pytest.raises(RequestError, match="9 tokens"):
        mixed(engine, TokenPrompt((1,), None, (Mixed((0,) * 9, None, 1.0),)))


async def test_members_without_a_seed_share_a_random_one() -> None:
    engine = ScriptedGroup(parts={0: 3})
    await read(mixed(engine, seed=None))
    await read(mixed(engine, seed=None))
    seeds = [recipe.seed for recipe, *_ in engine.started if recipe.role == 0]
    assert seeds[0] == seeds[1] != seeds[2]
