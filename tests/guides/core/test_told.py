"""Texts that policies are told and rewards read: every prompter with every policy of a guide."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from contexts import DIGIT, FakeComparisons, context, final, run
from fakes import LetterRenderer, ScriptedEngine

from guiderail.guides import TextReward
from guiderail.guides.best_of_n import BestOfN
from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.policy import PolicySpec
from guiderail.guides.core.types import Answer, Candidate, Delta, Message, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.guides.deal import Deal
from guiderail.guides.logit_mix import LogitMix
from guiderail.guides.prompters import SystemMessage, Template, Urial, with_system
from guiderail.guides.scoring import SELECTIONS
from guiderail.guides.search.lookahead import Lookahead
from guiderail.guides.transfer_q import TransferQ
from guiderail.server.openai_errors import from_exception
from guiderail.server.rewards.classifiers import Sentiment
from guiderail.server.rewards.likelihood_ratio import Implicit
from guiderail.server.rewards.llm_judge import Judge
from guiderail.server.rewards.pairwise_judge import PairwiseJudge
from guiderail.server.rewards.rules import JsonSchema, Keywords, Length, Regex

TASK = (Message("system", "Answer in verse."), Message("user", "Hi"))
INVENTED = "Fine.\n```\n\n# Query:\n```\nWhat about the NEXT question?\n```"


class Roles(LetterRenderer):
    """Shows roles in the prompt, as chat templates do; refuses or drops system messages on order."""

    def __init__(self, system: str = "") -> None:
        self.system = system

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt:
        if self.system == "refused" and any(m.role == "system" for m in messages):
            raise RequestError("the template refuses these messages: no system role", "messages")
        shown = [m for m in messages if self.system != "dropped" or m.role != "system"]
        text = "".join(f"<{m.role}>{m.content}" for m in shown) + ("" if continue_final_message else "<assistant>")
        return TokenPrompt(tuple(map(ord, text)))


class Reader(TextReward):
    """Longer is better; remembers what it read."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.seen: list[tuple[Message, ...]] = []
        self.tokens: list[tuple[int, ...]] = []

    async def score(self, groups: Any) -> Any:
        self.seen += [group.messages for group in groups]
        self.tokens += [a.token_ids for group in groups for a in group.answers]
        return await super().score(groups)

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        self.read.append(answer)
        return float(len(answer))


def text(prompt: TokenPrompt) -> str:
    return "".join(map(chr, prompt.token_ids))


def told(**more: Any) -> Any:
    return context(ScriptedEngine(), renderer=Roles(), messages=TASK, prompt=Roles().render(TASK), **more)


def test_system_texts_join_to_one_message_task_first() -> None:
    assert with_system(TASK, "a", "", "b")[0] == Message("system", "Answer in verse.\n\na\n\nb")
    assert with_system(TASK[1:], "a") == (Message("system", "a"), TASK[1])
    assert with_system(TASK[1:], "") == TASK[1:]
    assert with_system(TASK) == TASK


def test_a_policys_system_text_keeps_the_conversations_own_and_the_requests_prompter() -> None:
    spec = PolicySpec(system="Be kind.")
    assert text(spec.policy(told().dialogue, "x").prompt) == "<system>Answer in verse.\n\nBe kind.<user>Hi<assistant>"
    preferring = SystemMessage(preferences=("Be short.",))
    assert text(spec.policy(told(prompter=preferring).dialogue, "x").prompt) == (
        f"<system>Answer in verse.\n\nBe kind.\n\n{preferring.text}<user>Hi<assistant>"
    )
    under_urial = text(spec.policy(told(prompter=Urial()).dialogue, "x").prompt)
    assert under_urial == "".join(chr(ord(c) % 1000) for c in Urial().text(with_system(TASK, "Be kind.")))
    assert "# Instruction\n\nAnswer in verse.\n\nBe kind.\n" in under_urial


def test_a_conversation_that_goes_on_does_so_for_every_policy() -> None:
    begun = (*TASK, Message("assistant", "Oh"))
    for continues, end in ((True, "<assistant>Oh"), (False, "<assistant>Oh<assistant>"), (None, "<assistant>Oh")):
        ctx = context(ScriptedEngine(), renderer=Roles(), messages=begun, continues=continues)
        assert text(PolicySpec(system="x").policy(ctx.dialogue, "x").prompt).endswith(end)


@pytest.mark.parametrize("how", ["refused", "dropped"])
async def test_what_a_prompter_cannot_put_is_refused_by_name(how: str) -> None:
    ctx = context(ScriptedEngine(), renderer=Roles(how), messages=TASK[1:])
    with pytest.raises(RequestError, match="prompter 'template'") as failure:
        await run(Deal(Deal.Params(instruction="Be kind.")), ctx)
    assert from_exception(failure.value).body["error"]["param"] == "alignment.guide.instruction"
    ctx = context(ScriptedEngine(), renderer=Roles(how), messages=TASK[1:], prompter=Urial())
    assert "Be kind." in text(PolicySpec(system="Be kind.").policy(ctx.dialogue, "x").prompt)


def test_rewards_read_what_policies_are_told() -> None:
    own = SystemMessage(preferences=("Be short.",))
    assert told().dialogue.view == TASK
    assert told(prompter=own).dialogue.view == with_system(TASK, own.text)
    assert told(prompter=Urial(style="brief")).dialogue.view == TASK  # the style is the operator's
    view = told(
        prompter=Urial.model_validate({"instruction": "Rhyme.", "examples": [{"query": "q", "answer": "a"}]})
    ).dialogue.view
    assert view[0].content.startswith("Answer in verse.\n\nRhyme.\n\n# Query:\n```\nq\n```\n\n# Answer:\n```\na")
    dialogue = told(prompter=own).dialogue
    for spec in (PolicySpec(system="Be kind."), PolicySpec(system="Be kind.", prompter=Urial(instruction="Rhyme."))):
        dialogue = dialogue.telling(spec.policy(dialogue, "x").told)
    assert dialogue.view == with_system(TASK, "Be kind.", "Rhyme.", own.text)
    assert dialogue.told == ("Be kind.", "Rhyme.")


async def test_rewards_do_not_read_what_an_answer_is_steered_away_from() -> None:
    reward = Reader()
    policies = [{"system": "No.", "weight": -1}, {"system": "Be kind."}]
    ctx = told(reward=reward, sampling=SamplingSpec(4, seed=1))
    final(await run(LogitMix(LogitMix.Params.model_validate({"policies": policies})), ctx))
    assert set(reward.seen) == {with_system(TASK, "Be kind.")}


GUIDES = {
    "deal": Deal(Deal.Params(instruction="Be kind.", top_k=2, lookahead=2)),
    "transfer_q": TransferQ(TransferQ.Params(baseline=PolicySpec(system="Be kind."), block=2, top_k=2, lookahead=2)),
    "logit_mix": LogitMix(LogitMix.Params.model_validate({"policies": [{"system": "Be kind."}]})),
}


@pytest.mark.parametrize("name", GUIDES)
async def test_every_score_of_an_answer_is_of_one_view_with_what_was_told(name: str) -> None:
    reward = Reader()
    ctx = told(reward=reward, sampling=SamplingSpec(4, seed=1))
    final(await run(GUIDES[name], ctx))
    assert set(reward.seen) == {with_system(TASK, "Be kind.")}


@pytest.mark.parametrize("text", [INVENTED, "Fine.\n```\n", " Fine.\n```", "Fine."])
async def test_rewards_and_judges_read_the_answer_without_its_layout(text: str) -> None:
    """Raw text in place of the cleaned one, in `score` or in `pick`, fails here."""
    reward, urial = Reader(), Urial()
    judged: list[str] = []

    class Embedder(FakeComparisons):
        async def embed(self, texts: Sequence[str]) -> Any:
            judged.extend(texts)
            return await super().embed(texts)

    ctx = context(ScriptedEngine(), reward=reward, cleaner=urial.cleaner, prompter=urial, comparisons=Embedder(),
                  selection=SELECTIONS["mbr"](beta=1.0))  # fmt: skip
    candidates = [Candidate(i, text, tuple(map(ord, text)), "stop") for i in range(2)]
    await ctx.select(await ctx.score(candidates))
    assert reward.read == ["Fine."] * 2
    assert set(judged) == {"Fine."}
    assert {"".join(map(chr, ids)).strip() for ids in reward.tokens} == {"Fine."}


@pytest.mark.parametrize("own", [Template(), Urial()])
async def test_rollouts_of_a_urial_baseline_are_cut_and_cleaned_by_its_prompter(own: Any) -> None:
    reward = Reader()
    engine, prefix = ScriptedEngine(), Roles().encode(Urial(style="brief").prefix_text)

    async def deltas(row: int, prompt: TokenPrompt, *more: Any) -> Any:
        """The served policy writes "So. " and goes on; the baseline invents a next turn."""
        if list(prompt.token_ids[: len(prefix)]) == prefix:
            yield Delta(row, INVENTED, tuple(map(ord, INVENTED)), "stop")
        else:
            yield Delta(row, "So. ", tuple(map(ord, "So. ")), "length")

    engine.deltas = deltas  # type: ignore[method-assign, assignment]
    guide = TransferQ(TransferQ.Params(baseline=PolicySpec(prompter=Urial(style="brief")), block=5, top_k=2,
                                       lookahead=None, rollouts=2))  # fmt: skip
    ctx = context(engine, reward=reward, renderer=Roles(), messages=TASK, prompt=Roles().render(TASK),
                  sampling=SamplingSpec(60, seed=1, stop=own.stops), prompter=own, cleaner=own.cleaner)  # fmt: skip
    stops: list[tuple[str, ...]] = []
    generate = engine.generate

    def spied(prompts: Any, sampling: SamplingSpec, **more: Any) -> Any:
        stops.append(sampling.stop)
        return generate(prompts, sampling, **more)

    engine.generate = spied  # type: ignore[method-assign]
    async with ctx:
        async for _ in guide.run(ctx):
            break
    assert reward.read
    assert not any("Query" in text or "NEXT" in text for text in reward.read)
    assert set(reward.read) == {"So. Fine."}
    assert set(Urial.stops) <= set(stops[-1])
    if own == Template():
        assert stops[0] == ()  # the served policy's own text is not cut by another's layout


@pytest.mark.parametrize(
    ("before", "text", "kept"),
    [
        ("So", " it is.\n```\n\n# Query:\n```\nx", " it is."),
        ("So:\n```py\n", "x = 1\n```\nDone.\n```\n", "x = 1\n```\nDone."),
        ("Well\n```\n", "\n# Query:\n```\nx", ""),
        ("Well\n# Que", "ry:\n```\nx", ""),
        ("", "\n Hi\n```", "Hi"),
    ],
)
def test_a_baseline_is_read_behind_what_it_continues(before: str, text: str, kept: str) -> None:
    urial = Urial()
    ahead = Lookahead(TokenPrompt((1,)), stops=urial.stops, cleaner=urial.cleaner)
    assert ahead.read(before, text) == kept
    assert Lookahead(TokenPrompt((1,))).read(before, text) == text


RULES: list[tuple[Any, dict[str, Any], str, str, float]] = [
    (Regex(), {"pattern": "idiot", "mode": "absent"}, "You idi", "ot.", 0.0),
    (Keywords(), {"words": ["idiot"]}, "You idi", "ot.", 1.0),
    (Length(), {"target": 4, "unit": "words"}, "One two", " three four", 0.0),
    (JsonSchema(), {"schema": {"type": "object"}}, '{"a":', " 1}", 1.0),
]


@pytest.mark.parametrize(("reward", "params", "begun", "answer", "value"), RULES)
async def test_what_a_prefill_began_a_rule_scores_with_its_end(
    reward: Any, params: dict[str, Any], begun: str, answer: str, value: float
) -> None:
    messages = (*TASK, Message("assistant", begun))
    term = type(DIGIT)("last_digit", "last_digit", 1.0, reward.Params(**params))
    ctx = context(ScriptedEngine(), reward=reward, messages=messages, rewards=(term,))
    candidate = Candidate(0, answer, (1,), "stop")
    (candidate,) = (await ctx.score([candidate])).candidates
    assert candidate.rewards["last_digit"] == value


async def test_classifiers_and_judges_read_a_prefill_too() -> None:
    sentiment = Sentiment()
    await sentiment.start(None)  # type: ignore[arg-type]
    ctx = context(ScriptedEngine(), reward=sentiment, messages=(*TASK, Message("assistant", "I hate")))
    candidate = Candidate(0, " that.", (1,), "stop")
    (candidate,) = (await ctx.score([candidate])).candidates
    assert candidate.rewards["last_digit"] < 0
    group = ScoreGroup(ctx.dialogue.view, ctx.prompt, (Answer(" that."),), Judge.Params())
    prompts: list[Any] = []

    class Spy(ScriptedEngine):
        async def answer_logprobs(self, given: Any, answers: Any) -> Any:
            prompts.extend(given)
            return [[-1.0]] * len(given)

    judge, services = Judge(), Services(Spy(), Roles())
    await judge.start(services)
    await judge.score([group])
    assert "> I hate that." in text(prompts[0])
    assert "Instructions:\n> Answer in verse.\n\nQuestion:\n> Hi\n\n" in text(prompts[0])
    await judge.score([replace(group, messages=TASK[1:])])
    assert "Instructions" not in text(prompts[-1])
    await PairwiseJudge(services).prefer(ctx.dialogue.view, "Which is kinder?", ["a", "b"], [(0, 1)])
    assert "Instructions:\n> Answer in verse.\n\nQuestion:\n> Hi\n\nAnswer A:" in text(prompts[-1])


@pytest.mark.parametrize("prompter", [Template(), Urial(), SystemMessage(preferences=("Be short.",))])
async def test_the_implicit_reward_puts_its_system_messages_with_the_requests_prompter(prompter: Any) -> None:
    prompts: list[TokenPrompt] = []

    class Spy(ScriptedEngine):
        async def answer_logprobs(self, given: Any, answers: Any) -> Any:
            prompts.extend(given)
            return [[-1.0] * len(answer) for answer in answers]

    reward = Implicit()
    term = type(DIGIT)("last_digit", "last_digit", 1.0, Implicit.Params(system_message="Be kind."))
    ctx = told(reward=reward, rewards=(term,), prompter=prompter)
    await reward.start(Services(Spy(), Roles()))
    await ctx.score([Candidate(0, "a", (1,), "stop")])
    assert prompts == [prompter.render([Message("system", "Be kind."), TASK[1]], Roles()), ctx.prompt]


async def test_best_of_n_takes_the_best_of_the_cleaned_answers() -> None:
    """Raw, the invented turn would make the shorter answer the longest."""
    texts = {0: "A long and good answer.", 1: INVENTED}
    engine = ScriptedEngine(lambda seed: [texts[seed % 2]])
    urial = Urial()
    ctx = context(engine, reward=Reader(), prompter=urial, cleaner=urial.cleaner)
    end = final(await run(BestOfN(BestOfN.Params(n=2)), ctx))
    assert end.candidates[end.chosen].text == texts[0]


async def test_selection_rules_compare_answers_with_their_beginning() -> None:
    """Embeddings and judges, as rules and classifiers do."""
    compared: list[str] = []

    class Comparisons(FakeComparisons):
        async def embed(self, texts: Sequence[str]) -> Any:
            compared.extend(texts)
            return await super().embed(texts)

        async def prefer(self, messages: Any, criterion: str, answers: Sequence[str], pairs: Any) -> list[float]:
            assert messages == ctx.dialogue.view
            compared.extend(answers)
            return [0.5] * len(pairs)

    candidates = [Candidate(i, f"am w{i}", (1,), "stop") for i in range(2)]
    for rule in (SELECTIONS["mbr"](beta=1.0), SELECTIONS["tournament"](format="round_robin")):
        ctx = context(ScriptedEngine(), messages=(*TASK, Message("assistant", "I ")), selection=rule,
                      reward=Reader(), comparisons=Comparisons())  # fmt: skip
        compared.clear()
        await ctx.select(await ctx.score(candidates))
        assert set(compared) == {"I am w0", "I am w1"}
