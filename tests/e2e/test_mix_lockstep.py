"""Mixed rows that fall out of step in the real engine: a partner that is killed, rows that are preempted, formats."""

import json
from typing import Any, NamedTuple

import pytest
from serving import Live

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Engine
from guiderail.guides.core.types import Message, Mixed, SamplingSpec, TokenLogprob, TokenPrompt
from guiderail.server.engines.sequences import EngineSequence
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings
from guiderail.server.engines.vllm.mixture.lockstep import MixedSequence

ASK = Message("user", "Tell me about your day and a friend.")


class Attempt(NamedTuple):
    """One start of a group."""

    mixture: MixedSequence
    number: int
    replayed: int


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    """Every start of a group."""
    seen: list[Attempt] = []
    original = MixedSequence._attempt

    def spy(self: MixedSequence, attempt: int) -> Any:
        seen.append(Attempt(self, attempt, len(self._accepted)))
        return original(self, attempt)

    monkeypatch.setattr(MixedSequence, "_attempt", spy)
    return seen


def mixture(live: Live, adapter: str | None = None) -> TokenPrompt:
    render = live.state.renderer.render
    pirate = render((Message("system", "You are a pirate."), ASK)).token_ids
    return TokenPrompt(render((ASK,)).token_ids, None, (Mixed(pirate, adapter, 1.0),))


async def read(engine: Engine, prompts: list[TokenPrompt], spec: SamplingSpec, each: Any = None) -> list[Any]:
    """(text, tokens, logprobs) of each row; `each(row, tokens so far)` is awaited at every delta."""
    rows: list[Any] = [["", [], []] for _ in prompts]
    async with engine.generate(prompts, spec, seeds=[7 + i for i in range(len(prompts))]) as rollouts:
        async for delta in rollouts:
            row = rows[delta.row]
            row[0] += delta.text
            row[1] += delta.token_ids
            row[2] += delta.logprobs or ()
            if each is not None and delta.finish_reason is None:
                await each(delta.row, len(row[1]))
    return rows


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_killed_partner_costs_time_and_nothing_else(
    live: Live, attempts: list[Attempt], temperature: float
) -> None:
    """The same text, tokens and log-probabilities as undisturbed, a stop string and penalties among the conditions."""
    spec = SamplingSpec(40, temperature, logprobs=1, presence_penalty=0.6, stop=("zzz",), ignore_eos=True)
    prompt, engine = mixture(live), live.state.engine
    undisturbed = await read(engine, [prompt], spec)
    assert len(undisturbed[0][1]) == 40
    attempts.clear()
    killed: list[EngineSequence] = []

    async def kill(row: int, tokens: int) -> None:
        if tokens in (9, 25):
            partner = attempts[-1].mixture._members[1]
            if partner not in killed:
                killed.append(partner)
                await live.state.engine._inner._free(partner.give_up())

    disturbed = await read(engine, [prompt], spec, kill)
    assert len(killed) == 2
    assert [attempt.number for attempt in attempts] == [0, 1, 2]
    assert 9 <= attempts[1].replayed < 25 <= attempts[2].replayed
    assert disturbed[0][:2] == undisturbed[0][:2]
    together: list[tuple[TokenLogprob, TokenLogprob]] = list(zip(disturbed[0][2], undisturbed[0][2], strict=True))
    assert max(abs(a.logprob - b.logprob) for a, b in together) < 1e-3
    assert engine.num_running() == 0


async def test_an_answer_keeps_its_format_in_a_mixture(live: Live) -> None:
    """The grammar binds the served policy's row, and so the mixture; its partners know nothing of it."""
    rows = await read(
        live.state.engine, [mixture(live)] * 3, SamplingSpec(20, 1.0, json_schema={"enum": ["Ana", "Zoe"]})
    )
    assert {json.loads(text) for text, *_ in rows} <= {"Ana", "Zoe"}


async def test_no_log_probabilities_are_made_up_for_a_mixture(live: Live) -> None:
    with pytest.raises(RequestError, match="mixture"):
        await live.state.engine.next_token_logprobs([mixture(live)], 3)
    with pytest.raises(RequestError, match="mixture"):
        await live.state.engine.answer_logprobs([mixture(live)], [[1]])


async def test_a_deadline_ends_a_mixture(live: Live) -> None:
    import time

    ends, tokens = [], 0
    spec = SamplingSpec(500, 1.0, ignore_eos=True)
    deadline = time.monotonic() + 1.0
    async with live.state.engine.generate([mixture(live, "noise")] * 2, spec, deadline=deadline) as rollouts:
        async for delta in rollouts:
            ends.append(delta.finish_reason)
            tokens += len(delta.token_ids)
    assert [end for end in ends if end] == ["deadline"] * 2
    assert tokens < 2 * 500
    assert live.state.engine.num_running() == 0


async def test_more_rows_than_places_are_served_in_turn(live: Live, attempts: list[Attempt]) -> None:
    """80 mixtures are 160 rows; the engine has 128 places. None is parted by that."""
    spec = SamplingSpec(3, 1.0, ignore_eos=True)
    plain = TokenPrompt(mixture(live).token_ids)
    rows = await read(live.state.engine, [mixture(live)] * 80 + [plain] * 20, spec)
    assert {len(tokens) for _, tokens, _ in rows} == {3}
    assert [attempt[1:] for attempt in attempts] == [(0, 0)] * 80


@pytest.mark.slow
async def test_preempted_rows_end_with_the_answers_they_have_alone(
    model_path: str, live: Live, attempts: list[Attempt]
) -> None:
    """A KV cache for some 550 tokens, and six rows that would grow to 900.

    In the batch-invariant mode, which alone promises it: a preempted row computes its keys anew, in one step and beside
    others. In bfloat16 that rounds otherwise on any processor; in float32 what differed was attention alone, which
    vLLM splits over the keys of a row that has the threads for itself from 96 tokens on.
    """
    engine = await build(EngineSettings(model=model_path, max_model_len=256, kv_cache_gb=0.024, batch_invariant=True))
    try:
        spec = SamplingSpec(100, 0.8, ignore_eos=True)
        prompt = mixture(live)
        alone = []
        for seed in range(7, 10):
            async with engine.generate([prompt], spec, seeds=[seed]) as rollouts:
                alone.append([token async for delta in rollouts for token in delta.token_ids])
        assert {attempt.number for attempt in attempts} == {0}
        rows = await read(engine, [prompt] * 3, spec)
        assert any(attempt.number for attempt in attempts), "nothing was preempted: the test is void"
        assert {len(tokens) for tokens in alone} == {100}
        assert [tokens for _, tokens, _ in rows] == alone
        assert engine.num_running() == 0
    finally:
        await engine.close()
