"""What is too long for a reward is refused before any work, with its lengths; what an answer may have follows from it."""

import asyncio
from typing import Any

import httpx
import pytest
from fakes import ScriptedEngine, make_state
from serving import serving
from tiny_reward import tiny_tokenizer

from guiderail.guides.core.errors import TooLong
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.engines.engine_stats import RunnerStats
from guiderail.server.rewards.likelihood_ratio import Implicit, ImplicitOfModels, LoadedPair
from guiderail.server.rewards.llm_judge import Judge
from guiderail.server.rewards.models.conversation_tokens import ConversationEncoder
from guiderail.server.rewards.models.neural import LoadedReward, NeuralReward


class Counting(ScriptedEngine):
    """Counts what it is asked for."""

    asked = 0

    def generate(self, *args: Any, **how: Any) -> Any:
        self.asked += 1
        return super().generate(*args, **how)

    async def answer_logprobs(self, prompts: Any, answers: Any) -> Any:
        self.asked += 1
        return await super().answer_logprobs(prompts, answers)


class Lengths:
    """A reward model's backend, whose value is the length, and a language model beside the engine."""

    heads, stats = 1, RunnerStats()

    def __init__(self) -> None:
        self.conversations = ConversationEncoder(tiny_tokenizer())
        self.asked = 0

    async def score(self, sequences: Any) -> list[list[float]]:
        self.asked += 1
        return [[float(len(ids))] for ids in sequences]

    async def logprobs(self, texts: Any) -> list[list[float]]:
        self.asked += 1
        return [[-1.0] * (len(ids) - start) for ids, start in texts]

    async def close(self) -> None:
        return


async def started(name: str, engine: Counting, backend: Lengths) -> Any:
    async def reward_model() -> LoadedReward:
        return LoadedReward(backend, backend.conversations, 64)  # type: ignore[arg-type]

    async def pair() -> LoadedPair:
        return LoadedPair(backend, backend, 64, RunnerStats())  # type: ignore[arg-type]

    made: dict[str, Any] = {
        "judge": Judge, "implicit": Implicit,
        "model": lambda: NeuralReward(reward_model), "pair": lambda: ImplicitOfModels(pair, lambda: "pair"),
    }  # fmt: skip
    reward = made[name]()
    state = make_state(engine, {name: reward})
    await reward.start(Services(engine, state.renderer, context=lambda: engine.max_model_len))
    return state


LONG = "w1 " * 400  # letters are tokens to the served model, words to the reward models of 64
REWARDS = ["judge", "implicit", "model", "pair"]


@pytest.mark.parametrize("name", REWARDS)
async def test_a_conversation_that_is_too_long_for_a_reward_is_refused_before_anything_is_generated(name: str) -> None:
    engine, backend = Counting(max_model_len=1250), Lengths()
    state = await started(name, engine, backend)
    alignment = {"guide": {"name": "best_of_n", "n": 2}, "rewards": [name]}
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": LONG}], "alignment": alignment, "stream": stream}
            answer = await client.post("/v1/chat/completions", json={**body, "max_tokens": 8})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert f"reward '{name}'" in error["message"]
            assert {"judge": "1249", "implicit": "1250"}.get(name, "64") in error["message"]
            assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert engine.asked + backend.asked == 0
        fits = {"messages": [{"role": "user", "content": "w1"}], "alignment": alignment, "max_tokens": 8}
        assert (await client.post("/v1/chat/completions", json=fits)).status_code == 200
    assert engine.asked + backend.asked > 0


@pytest.mark.parametrize("name", REWARDS)
async def test_no_answer_is_scored_if_one_of_a_request_is_too_long(name: str) -> None:
    engine, backend = Counting(max_model_len=1000), Lengths()
    state = await started(name, engine, backend)
    inputs = [{"messages": [{"role": "user", "content": "w1"}], "answers": ["w2", *more]} for more in ([], [LONG])]
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post("/v1/rewards/score", json={"inputs": inputs, "rewards": [name]})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert f"reward '{name}'" in error["message"]
        assert engine.asked + backend.asked == 0
        answer = await client.post("/v1/rewards/score", json={"inputs": inputs[:1], "rewards": [name]})
        assert answer.status_code == 200
    assert engine.asked + backend.asked > 0


@pytest.mark.parametrize(("name", "least"), [("judge", 100), ("implicit", 90)])
async def test_an_answer_is_as_long_as_its_judge_reads(name: str, least: int) -> None:
    """By default what is left; more is refused, with what is allowed."""
    engine = Counting(script=lambda seed: ["w"] * 600, max_model_len=600)
    state = await started(name, engine, Lengths())
    alignment = {"guide": {"name": "best_of_n", "n": 2}, "rewards": [name]}
    body = {"messages": [{"role": "user", "content": "w1"}], "alignment": alignment}
    async with serving(state) as url, httpx.AsyncClient(base_url=url) as client:
        refused = await client.post("/v1/chat/completions", json={**body, "max_tokens": 590})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        message = refused.json()["error"]["message"]
        left = int(message.split("may have ")[1].split()[0])
        assert f"reward '{name}'" in message
        assert 0 < left < 600 - least
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == left
        assert (await client.post("/v1/chat/completions", json={**body, "max_tokens": left})).status_code == 200
        assert (await client.post("/v1/chat/completions", json={**body, "max_tokens": left + 1})).status_code == 400


async def test_a_judge_that_meets_a_longer_text_all_the_same_names_its_lengths_and_asks_nothing() -> None:
    engine = Counting(max_model_len=400)
    state = await started("judge", engine, Lengths())
    group: Any = ScoreGroup((Message("user", "w1"),), TokenPrompt((1,)), (Answer("\n" * 200),), Judge.Params())
    with pytest.raises(TooLong, match=r"reward 'judge': .* tokens; it may have 399"):
        await asyncio.wait_for(state.scorer.score("judge", group), 10)
    assert engine.asked == 0
