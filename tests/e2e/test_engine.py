"""The real engine beneath the server: exact log-probabilities, adapters beside base rows, dropping rows."""

import asyncio
import math
import time

import pytest
import torch
from serving import Live

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Answer, Message, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.server.engines.policies import check_adapter
from guiderail.server.engines.vllm.scheduling.short_steps import MANY_SEQUENCES
from guiderail.server.rewards.likelihood_ratio import Implicit
from guiderail.server.rewards.llm_judge import Judge
from guiderail.server.rewards.pairwise_judge import PairwiseJudge

ASK = (Message("user", "Tell me about your day and a friend."),)


def prompt(live: Live, messages: tuple[Message, ...] = ASK, adapter: str | None = None) -> TokenPrompt:
    return TokenPrompt(live.state.renderer.render(messages).token_ids, adapter)


@pytest.fixture(scope="module")
def reference(model_path: str) -> torch.nn.Module:
    """The same weights in float32 under transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def expected(model: torch.nn.Module, ids: tuple[int, ...], answer: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]])).logits[0]
    rows = torch.log_softmax(logits[len(ids) - 1 : -1], dim=-1)
    return [rows[i, token].item() for i, token in enumerate(answer)]


async def test_answer_logprobs_agree_with_transformers(live: Live, reference: torch.nn.Module) -> None:
    """Whatever the answers' lengths: the live engine runs in float32 (serving.engine_dtype)."""
    texts = ["I met my friend Ana in the park.", "No.", "The the the xylophone!"]
    answers = [live.state.renderer.encode(text) for text in texts]
    ask = prompt(live)
    rows = await live.state.engine.answer_logprobs([ask] * 3, answers)
    for row, answer in zip(rows, answers, strict=True):
        wanted = expected(reference, ask.token_ids, answer)
        assert len(row) == len(answer)
        assert max(abs(a - b) for a, b in zip(row, wanted, strict=True)) < 1e-3
    elsewhere = expected(reference, prompt(live, (Message("user", "Count to three."),)).token_ids, answers[0])
    assert max(abs(a - b) for a, b in zip(rows[0], elsewhere, strict=True)) > 0.8, "the prompt makes no difference"


async def test_forced_rows_leave_their_neighbours_alone(live: Live) -> None:
    """A row with top log-probabilities gives the same beside forced rows as alone."""
    spec = SamplingSpec(max_tokens=12, temperature=0, logprobs=3)

    async def run() -> list[tuple[int, ...]]:
        ids, tops = [], []
        async with live.state.engine.generate([prompt(live)], spec) as rollouts:
            async for delta in rollouts:
                ids += delta.token_ids
                tops += [tuple(t for t, _ in row.top[:3]) for row in delta.logprobs or ()]
        return [tuple(ids), *tops]

    alone = await run()
    answers = [live.state.renderer.encode("A completely different answer, word by word.")] * 3
    beside, _ = await asyncio.gather(run(), live.state.engine.answer_logprobs([prompt(live)] * 3, answers))
    assert beside[0] == alone[0]
    assert all(len(top) == 3 for top in beside[1:])


async def test_rows_that_sit_out_steps_go_on_where_they_were(live: Live) -> None:
    """Many rows sit out the steps in which plain chats begin (vllm/scheduling): it shows in nothing that they give."""
    engine, many = live.state.engine, MANY_SEQUENCES + 4
    words = live.state.renderer.encode("A completely different answer, word by word, of some length, about nothing.")
    answers = [words[i % len(words) :] + words for i in range(many)]
    alone = await engine.answer_logprobs([prompt(live)] * many, answers)

    async def chat(number: int) -> int:
        ask = prompt(live, (Message("user", f"Say {number}."),))
        async with engine.generate([ask], SamplingSpec(max_tokens=3, ignore_eos=True)) as rollouts:
            return sum([len(delta.token_ids) async for delta in rollouts])

    scoring = asyncio.create_task(engine.answer_logprobs([prompt(live)] * many, answers))
    chats = 0
    while not scoring.done():
        assert await chat(chats) == 3
        chats += 1
    assert chats > 2
    for before, beside in zip(alone, await scoring, strict=True):
        assert max(abs(a - b) for a, b in zip(before, beside, strict=True)) < 1e-3


async def test_next_token_logprobs(live: Live) -> None:
    (row,) = await live.state.engine.next_token_logprobs([prompt(live)], 5)
    assert len(row) == 5
    assert 0.3 < sum(math.exp(value) for value in row.values()) <= 1.0


async def test_base_rows_are_the_same_beside_adapter_rows(live: Live) -> None:
    """vLLM's CPU path would lend them the last adapter's weights; the engine keeps a slot of zeros for them."""
    names = [None, "noise", "zero", None]
    ids: list[list[int]] = [[] for _ in names]
    async with live.state.engine.generate(
        [prompt(live, ASK, n) for n in names], SamplingSpec(24, temperature=0)
    ) as rollouts:
        async for delta in rollouts:
            ids[delta.row] += delta.token_ids
    assert ids[0] == ids[2] == ids[3] != ids[1]


async def test_an_adapter_acts_as_its_merged_weights(
    live: Live, reference: torch.nn.Module, adapters: dict[str, str]
) -> None:
    import copy

    from safetensors.torch import load_file

    merged = copy.deepcopy(reference)
    for name, tensor in load_file(f"{adapters['noise']}/adapter_model.safetensors").items():
        if "lora_A" in name:
            continue
        down = load_file(f"{adapters['noise']}/adapter_model.safetensors")[name.replace("lora_B", "lora_A")]
        module = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
        module.weight.data += tensor @ down
    answer = live.state.renderer.encode("I met my friend Ana in the park.")
    ask = prompt(live, ASK, "noise")
    (row,) = await live.state.engine.answer_logprobs([ask], [answer])
    wanted, base = expected(merged, ask.token_ids, answer), expected(reference, ask.token_ids, answer)
    error = sum(abs(a - b) for a, b in zip(row, wanted, strict=True))
    assert error < 0.25 * sum(abs(a - b) for a, b in zip(row, base, strict=True))


async def test_a_dropped_row_is_freed_while_the_others_go_on(live: Live) -> None:
    engine = live.state.engine
    spec = SamplingSpec(max_tokens=60, ignore_eos=True)
    ends: dict[int, str | None] = {}
    async with engine.generate([prompt(live)] * 4, spec) as rollouts:
        async for delta in rollouts:
            if delta.row == 2 and delta.finish_reason is None and engine.num_running() == 4:
                await rollouts.drop(2)
                for _ in range(20):  # what is dropped in one turn of the event loop is freed together, in the next ones
                    await asyncio.sleep(0)
                assert engine.num_running() == 3
            if delta.finish_reason:
                ends[delta.row] = delta.finish_reason
    assert ends == {0: "length", 1: "length", 2: "dropped", 3: "length"}
    assert engine.num_running() == 0


async def test_a_deadline_frees_rows_with_what_they_have(live: Live) -> None:
    """A busy machine may not come to a fourth token before the deadline: then a later one is tried."""
    spec = SamplingSpec(max_tokens=500, ignore_eos=True, stream=False)
    for seconds in (0.7, 2.8, 11.2):
        ends = []
        deadline = time.monotonic() + seconds
        async with live.state.engine.generate([prompt(live)] * 3, spec, deadline=deadline) as rollouts:
            async for delta in rollouts:
                ends.append((delta.finish_reason, len(delta.token_ids)))
        assert live.state.engine.num_running() == 0
        assert [end for end, _ in ends] == ["deadline"] * 3
        if min(tokens for _, tokens in ends) > 3:
            break
    assert all(3 < tokens < 500 for _, tokens in ends)


async def score(live: Live, name: str, texts: list[str], **params: object) -> tuple[float, ...]:
    reward = live.state.rewards[name]
    answers = tuple(Answer(text, tuple(live.state.renderer.encode(text))) for text in texts)
    group = ScoreGroup(ASK, prompt(live), answers, reward.Params(**params))
    (result,) = await reward.score([group])
    assert result.tokens > 0
    return result.values


async def test_the_implicit_reward_is_the_log_likelihood_ratio(live: Live, reference: torch.nn.Module) -> None:
    text = "I met my friend Ana in the park."
    answer = live.state.renderer.encode(text)
    message = "You only ever talk about cooking."
    (value,) = await score(live, "implicit", [text], system_message=message)
    policy = prompt(live, (Message("system", message), *ASK)).token_ids
    wanted = sum(expected(reference, policy, answer)) - sum(expected(reference, prompt(live).token_ids, answer))
    assert value == pytest.approx(wanted, abs=0.01)
    (mean,) = await score(live, "implicit", [text], system_message=message, per_token=True)
    assert mean == pytest.approx(value / len(answer), abs=1e-3)
    (by_adapter,) = await score(live, "implicit", [text], adapter="zero", system_message=None, reference_adapter=None)
    assert abs(by_adapter) < 0.01


async def test_the_implicit_reward_of_an_empty_answer_is_zero(live: Live) -> None:
    assert (await score(live, "implicit", ["", "Hello."]))[0] == 0.0


async def test_the_judge_reads_yes_against_no(live: Live, reference: torch.nn.Module) -> None:
    values = await score(
        live, "judge", ["I like trains.", "I like trains a lot."], rubric="Does the answer talk about trains?"
    )
    assert all(0 < value < 1 for value in values)
    text = (
        f"Question:\n> {ASK[0].content}\n\nAnswer:\n> I like trains.\n\n"
        "Does the answer talk about trains? Reply with Yes or No only."
    )
    ids = live.state.renderer.render((Message("user", text),)).token_ids
    yes, no = (expected(reference, ids, live.state.renderer.encode(word)[:1])[0] for word in ("Yes", "No"))
    assert values[0] == pytest.approx(1 / (1 + math.exp(no - yes)), abs=1e-3)


async def test_the_pairwise_judge_reads_a_against_b_in_both_orders(live: Live, reference: torch.nn.Module) -> None:
    answers = ["I like trains.", "Trains are loud, slow and late."]
    judge = PairwiseJudge(Services(live.state.engine, live.state.renderer))
    first, second = await judge.prefer(ASK, "Which answer is friendlier to trains?", answers, [(0, 1), (1, 0)])
    assert first == 1 - second
    chances = []
    for a, b in (answers, answers[::-1]):
        text = (
            f"Question:\n> {ASK[0].content}\n\nAnswer A:\n> {a}\n\nAnswer B:\n> {b}\n\n"
            "Which answer is friendlier to trains? Reply with A or B only."
        )
        ids = live.state.renderer.render((Message("user", text),)).token_ids
        own, other = (expected(reference, ids, live.state.renderer.encode(letter)[:1])[0] for letter in "AB")
        chances.append(1 / (1 + math.exp(other - own)))
    assert first == pytest.approx((chances[0] + 1 - chances[1]) / 2, abs=1e-3)


async def test_rewards_refuse_what_cannot_work(live: Live) -> None:
    services = Services(live.state.engine, live.state.renderer, frozenset({"zero"}))
    with pytest.raises(ValueError, match="loaded: zero"):
        Judge().check(Judge.Params(adapter="nope"), services)
    with pytest.raises(ValueError, match="always 0"):
        Implicit().check(Implicit.Params(system_message=None), services)


def test_bad_adapters_are_refused_before_the_engine_sees_them(tmp_path: object, adapters: dict[str, str]) -> None:
    check_adapter("zero", adapters["zero"], 16)
    with pytest.raises(RequestError, match="rank 8"):
        check_adapter("zero", adapters["zero"], 4)
    with pytest.raises(RequestError, match="cannot read"):
        check_adapter("none", "/nowhere", 16)


async def test_seeded_long_prompts_at_once_do_not_kill_the_engine(live: Live) -> None:
    """Together they exceed one step's tokens; split over two, vLLM on CPU would die of their seeds."""
    prompts = [TokenPrompt(tuple(range(100 + i, 1000 + i))) for i in range(4)]
    ends = []
    async with live.state.engine.generate(prompts, SamplingSpec(max_tokens=2), seeds=[1, 2, 3, 4]) as rollouts:
        async for delta in rollouts:
            ends += [delta.row] if delta.finish_reason else []
    assert sorted(ends) == [0, 1, 2, 3]
    assert live.state.engine.up
