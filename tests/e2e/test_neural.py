"""A transformer reward end to end: the packed runner behind the real server, and the scoring endpoint."""

import asyncio
from typing import Any

import httpx
import pytest
import torch
from serving import Live

from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt

ASK: list[Any] = [{"role": "user", "content": "Tell me about your day and a friend."}]


@pytest.fixture(scope="module")
def reference(model_path: str, reward_head: str) -> Any:
    """Scores a conversation with transformers in float32: text under the chat template -> [2] values."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    weight = load_file(f"{reward_head}/head.safetensors")["score.weight"]

    def score(answer: str, *, partial: bool = False) -> Any:
        turns = [*ASK, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=partial)
        text = text if partial else text.rstrip()  # a head scores at the end of the turn
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids).last_hidden_state[0, -1] @ weight.T

    return score


async def test_best_of_n_with_a_reward_model(live: Live, reference: Any) -> None:
    alignment = {"guide": {"name": "best_of_n", "n": 8}, "rewards": [{"name": "neural"}], "return_candidates": True}
    body = {"messages": ASK, "max_tokens": 24, "seed": 1, "alignment": alignment}
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as http:
        answer = (await http.post("/v1/chat/completions", json=body)).json()
        metrics = (await http.get("/metrics")).text
    choice = answer["alignment"]["choices"][0]
    for candidate in choice["candidates"]:
        assert candidate["rewards"]["neural"] == pytest.approx(reference(candidate["text"])[0].item(), abs=0.15)
    assert choice["chosen"] == max(choice["candidates"], key=lambda c: c["score"])["index"]
    spend = answer["alignment"]["spend"]
    assert spend["reward_tokens"] > 8 * 24
    (line,) = (line for line in metrics.splitlines() if 'kind="cached"' in line and 'reward="neural"' in line)
    assert float(line.rpartition(" ")[2]) > 0, "the shared prompt was computed for every candidate"


async def test_the_endpoint_scores_given_answers(live: Live, reference: Any) -> None:
    answers = ["I met Ana.", {"text": "I met Ana", "partial": True}, "No."]
    rewards = [
        {"name": "neural", "weight": 2.0}, {"name": "neural", "label": "mixed", "heads": [0.5, -1.0]},
        {"name": "length", "target": 3, "weight": -1.0},
    ]  # fmt: skip
    inputs = [{"messages": ASK, "answers": answers}, {"messages": ASK, "answers": ["I met Ana."]}]
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as http:
        response = await http.post("/v1/rewards/score", json={"inputs": inputs, "rewards": rewards})
    assert response.status_code == 200, response.text
    body = response.json()
    first = body["data"][0]["answers"]
    wanted = [reference("I met Ana."), reference("I met Ana", partial=True), reference("No.")]
    for got, (one, two) in zip(first, (w.tolist() for w in wanted), strict=True):
        assert got["rewards"]["neural"] == pytest.approx(one, abs=0.15)
        assert got["rewards"]["mixed"] == pytest.approx(0.5 * one - two, abs=0.2)
        values = got["rewards"]
        assert got["score"] == pytest.approx(2 * values["neural"] + values["mixed"] - values["length"])
    assert first[0]["rewards"]["length"] == 0.0
    assert body["data"][1]["answers"][0]["rewards"] == pytest.approx(first[0]["rewards"], abs=1e-6)
    assert body["usage"]["reward_tokens"] > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rewards": ["length"]}, "inputs"),
        ({"inputs": [{"messages": ASK, "answers": []}], "rewards": ["length"]}, "inputs[0].answers"),
        ({"inputs": [{"messages": ASK, "answers": ["a"]}], "rewards": []}, "rewards"),
        ({"inputs": [{"messages": ASK, "answers": ["a"]}], "rewards": ["nope"]}, "rewards[0].name"),
        (
            {"inputs": [{"messages": ASK, "answers": ["a"]}], "rewards": [{"name": "neural", "heads": [1]}]},
            "rewards[0]",
        ),
        ({"inputs": [{"messages": ASK, "answers": ["a"], "anwsers": []}], "rewards": ["length"]}, "inputs[0].anwsers"),
        ({"inputs": [{"messages": ASK, "answers": [3]}], "rewards": ["length"]}, "inputs[0].answers[0]"),
    ],
)
async def test_bad_score_requests(live: Live, body: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=live.url) as http:
        response = await http.post("/v1/rewards/score", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_process_rewards_read_marked_steps(live: Live, reference: Any) -> None:
    text = "First this.\nThen that.\nDone"
    reward = live.state.rewards["neural"]
    values = {}
    for how in ("min", "mean", "last", "sum"):
        params = reward.Params(steps="\n", aggregate=how)
        group = ScoreGroup((Message("user", ASK[0]["content"]),), TokenPrompt((1,)), (Answer(text),), params)
        (result,) = await reward.score([group])
        values[how] = result.values[0]
    parts = [reference(p, partial=True)[0].item() for p in ("First this.\n", "First this.\nThen that.\n")]
    steps = [*parts, reference(text)[0].item()]
    assert values["last"] == pytest.approx(steps[-1], abs=0.15)
    assert values["min"] == pytest.approx(min(steps), abs=0.15)
    assert values["sum"] == pytest.approx(sum(steps), abs=0.25)
    assert values["mean"] == pytest.approx(values["sum"] / 3, abs=1e-6)


async def test_a_longer_answer_costs_its_new_tokens(live: Live) -> None:
    reward = live.state.rewards["neural"]
    question = (Message("user", "A question that no other test asks, about lighthouses."),)

    async def computed(text: str) -> int:
        before = reward.stats.tokens_computed
        await reward.score([ScoreGroup(question, TokenPrompt((1,)), (Answer(text, partial=True),), reward.Params())])
        return int(reward.stats.tokens_computed - before)

    start = "Lighthouses stand on the coast and"
    assert await computed(start) > 20
    assert await computed(f"{start} warn ships") <= 4


async def test_the_loop_goes_on_while_a_large_batch_is_scored(live: Live) -> None:
    """The event loop is never held for the time of a batch: it ticks on while one is scored."""
    reward = live.state.rewards["neural"]
    answers = tuple(Answer(f"Answer {i}: " + "word " * 60) for i in range(24))
    group = ScoreGroup((Message("user", "Go on."),), TokenPrompt((1,)), answers, reward.Params())
    scoring = asyncio.create_task(reward.score([group]))
    ticks = 0
    while not scoring.done():
        await asyncio.sleep(0.01)
        ticks += 1
    await scoring
    assert ticks > 10
