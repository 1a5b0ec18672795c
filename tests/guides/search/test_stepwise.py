"""The text of guides that commit an answer in steps: the same as that of one plain generation, wherever steps end."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from contexts import final, run
from every_guide import EVERY, REWARDS, STEPWISE, Endless, Script, flat_scores, random_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tabular_context import tabular_context
from tabular_engine import PROMPT, TabularEngine, TabularRenderer

from guiderail.guides.args import Args
from guiderail.guides.controlled_decoding import ControlledDecoding
from guiderail.guides.core.context import Context
from guiderail.guides.core.guide import Guide
from guiderail.guides.core.metering import Limits
from guiderail.guides.core.types import Event, Final, SamplingSpec, Token, TokenPrompt
from guiderail.guides.sampling import Sampling
from guiderail.guides.scoring.kl import Origin
from guiderail.guides.search.lookahead import value
from guiderail.guides.search.sequence import Piece
from guiderail.guides.search.stepwise import MAX_TOP_K, Steps, draw_blocks
from guiderail.guides.search.transcript import Transcript

SMILE = "😀".encode()
TEXTS = {
    1: b"a", 2: b"b", 3: b"ab", 4: b"ba b", 5: b" ", 6: "é".encode()[:1], 7: "é".encode()[1:],
    8: SMILE[:2], 9: SMILE[2:], 10: "é".encode(), 11: b"a" + SMILE[:1], 12: SMILE[1:],
}  # fmt: skip
VOCABULARY = len(TEXTS) + 1
RENDERER = TabularRenderer(TEXTS)

scripts = st.lists(st.integers(0, VOCABULARY - 1), max_size=14) | st.lists(st.sampled_from([1, 2, 3, 4]), max_size=14)
stops = st.lists(st.text("ab é😀", min_size=1, max_size=4), max_size=3).map(tuple)
samplings = st.builds(
    SamplingSpec,
    max_tokens=st.integers(1, 14),
    temperature=st.just(0.0),
    stop=stops,
    include_stop_str_in_output=st.booleans(),
    stop_token_ids=st.sampled_from([(), (2,), (2, 5)]),
    min_tokens=st.sampled_from([0, 0, 1, 3, 6]),
    skip_special_tokens=st.booleans(),
    seed=st.just(1),
)


async def play(guide: Any, script: list[int], sampling: SamplingSpec) -> tuple[str, tuple[int, ...], Final]:
    """(streamed text, streamed tokens, Final) of a guide over a scripted engine."""
    policy = Script(script, VOCABULARY)
    engine = TabularEngine({None: policy, "adapter": policy}, renderer=RENDERER)
    events = await run(guide, tabular_context(engine, flat_scores(), weights=REWARDS, sampling=sampling))
    assert engine.num_running() == 0
    tokens = [e for e in events if isinstance(e, Token)]
    return "".join(t.text for t in tokens), sum((t.token_ids for t in tokens), ()), final(events)


@pytest.mark.parametrize("name", EVERY)
@given(script=scripts, sampling=samplings)
@example(script=[1, 1, 3, 2, 1], sampling=SamplingSpec(9, temperature=0.0, stop=("aab", "b"), seed=1))
@example(script=[1, 2, 1, 2, 1, 2], sampling=SamplingSpec(9, temperature=0.0, stop=("ba",), min_tokens=2, seed=1))
@example(script=[1, 2, 1, 2, 1, 2], sampling=SamplingSpec(9, temperature=0.0, stop=("ba",), min_tokens=1, seed=1))
@example(script=[8, 9, 6, 7], sampling=SamplingSpec(3, temperature=0.0, seed=1))
@example(script=[1, 0], sampling=SamplingSpec(9, temperature=0.0, skip_special_tokens=False, seed=1))
@example(
    script=[2, 1], sampling=SamplingSpec(3, temperature=0.0, stop=("ba",), stop_token_ids=(2,), min_tokens=1, seed=1)
)
@settings(max_examples=100, deadline=None)
async def test_every_guide_over_a_sure_policy_says_what_sampling_says(
    name: str, script: list[int], sampling: SamplingSpec
) -> None:
    """Text, streamed and whole, tokens and the reason of the end. The policy has one answer, so nothing else differs."""
    if sampling.min_tokens > sampling.max_tokens:
        return
    text, ids, end = await play(Sampling(Sampling.Params()), script, sampling)
    found, found_ids, found_end = await play(EVERY[name](), script, sampling)
    assert found == text == end.candidates[0].text == found_end.candidates[found_end.chosen].text
    assert found_ids == ids == found_end.candidates[found_end.chosen].token_ids
    assert (found_end.finish_reason, found_end.stop_reason) == (end.finish_reason, end.stop_reason)


@given(script=scripts, sampling=samplings, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=14))
@settings(max_examples=300, deadline=None)
def test_any_pieces_give_the_text_of_the_whole(script: list[int], sampling: SamplingSpec, cuts: list[int]) -> None:
    """Even where a piece goes on behind a stop string; and no more is held back than may become a stop string."""
    if sampling.min_tokens > sampling.max_tokens:
        return
    engine = TabularEngine({None: Script(script, VOCABULARY)}, renderer=RENDERER)
    row = engine.row(TokenPrompt(PROMPT), sampling, 1)
    ids = list(row.ids)
    beyond = 3 if isinstance(row.stop_reason, str) else 0
    ids += [1] * beyond
    transcript = Transcript(tabular_context(engine, flat_scores(), sampling=sampling))
    sent = ""
    while ids:
        length = cuts.pop() if cuts else len(ids)
        piece, ids = Piece("", ids[:length], [], "length"), ids[length:]
        if not ids and not beyond:
            piece.finish_reason, piece.stop_reason = row.finish_reason, row.stop_reason
        transcript.commit(piece)
        ended = transcript.whole().finished
        sent += transcript.token(last=ended).text
        assert transcript.whole().text.startswith(sent)
        if ended:
            break
        assert len(transcript.whole().text) - len(sent) < max((len(stop) for stop in sampling.stop), default=1)
    answer = transcript.whole()
    assert (answer.text, answer.token_ids) == (row.texts[-1], row.ids)
    assert (answer.finish_reason, answer.stop_reason) == (row.finish_reason, row.stop_reason)
    assert sent == answer.text


async def test_text_streams_as_it_is_committed_and_half_characters_wait() -> None:
    script = [1, 8, 9, 2, 6, 7, 1]
    policy = Script(script, VOCABULARY)
    engine = TabularEngine({None: policy}, renderer=RENDERER)
    ctx = tabular_context(engine, flat_scores(), sampling=SamplingSpec(7, temperature=0.0, seed=1))
    guide = ControlledDecoding(ControlledDecoding.Params(k=2, block=1))
    events = [(e.text, e.token_ids) for e in await run(guide, ctx) if isinstance(e, Token)]
    assert events == [("a", (1,)), ("", (8,)), ("😀", (9,)), ("b", (2,)), ("", (6,)), ("é", (7,)), ("a", (1,))]


async def test_what_may_become_a_stop_string_waits_and_comes_if_it_does_not() -> None:
    engine = TabularEngine({None: Script([1, 2, 1, 5, 1, 2, 0], VOCABULARY)}, renderer=RENDERER)
    sampling = SamplingSpec(9, temperature=0.0, stop=("aba!", "x"), seed=1)
    guide = ControlledDecoding(ControlledDecoding.Params(k=1, block=1))
    events = await run(guide, tabular_context(engine, flat_scores(), sampling=sampling))
    assert [e.text for e in events if isinstance(e, Token)] == ["", "", "", "aba ", "", "", "ab"]


@pytest.mark.parametrize("name", STEPWISE)
async def test_a_stop_string_across_a_border_ends_the_answer(name: str) -> None:
    """Unlike in the tests above the policy has a choice at each token."""
    for seed in range(5):
        engine = TabularEngine({None: Endless(seed=seed), "adapter": Endless(seed=seed + 9)})
        sampling = SamplingSpec(60, stop=("ab", "bcd", "da"), min_tokens=4, seed=seed)
        ctx = tabular_context(engine, random_scores(), weights=REWARDS, sampling=sampling)
        events = await run(EVERY[name](), ctx)
        end, answer = final(events), final(events).candidates[0]
        assert "".join(e.text for e in events if isinstance(e, Token)) == answer.text
        assert sum((e.token_ids for e in events if isinstance(e, Token)), ()) == answer.token_ids
        if end.finish_reason == "stop":
            whole = engine.renderer.decode(answer.token_ids)
            assert end.stop_reason in sampling.stop
            assert whole == answer.text + str(end.stop_reason)
        else:
            assert len(answer.token_ids) == 60
        assert not any(stop in answer.text[4:] for stop in sampling.stop)


async def test_no_more_log_probabilities_are_asked_for_than_the_engine_serves() -> None:
    """With the largest top_k and tokens that must not come yet; these would end the answer at once."""
    engine = TabularEngine(
        {None: Script([1, 2, 3, 4, 5, 6], 60)}, renderer=TabularRenderer(dict.fromkeys(range(1, 60), b"x"))
    )
    sampling = SamplingSpec(9, min_tokens=4, stop_token_ids=tuple(range(1, 8)), seed=1)
    ctx = tabular_context(engine, flat_scores(), sampling=sampling)
    answer = final(await run(Args(Args.Params(top_k=MAX_TOP_K)), ctx)).candidates[0]
    assert len(answer.token_ids) == 5
    assert not set(answer.token_ids[:4]) & set(range(8))
    assert answer.stop_reason == 5


@pytest.mark.parametrize("name", EVERY)
async def test_log_probabilities_are_one_a_token_and_the_policys(name: str) -> None:
    engine = TabularEngine({None: Endless(seed=1, end=0.05), "adapter": Endless(seed=2, end=0.05)})
    sampling = SamplingSpec(17, logprobs=4, stop=("dd",), seed=4)
    ctx = tabular_context(engine, random_scores(), weights=REWARDS, sampling=sampling)
    events = await run(EVERY[name](), ctx)
    tokens = [e for e in events if isinstance(e, Token)]
    found = [logprob for e in tokens for logprob in e.logprobs or ()]
    answer = final(events).candidates[final(events).chosen]
    assert [each.token_id for each in found] == list(answer.token_ids) == [t for e in tokens for t in e.token_ids]
    assert tuple(found) == answer.logprobs
    (exact,) = await engine.answer_logprobs([ctx.prompt], [answer.token_ids])
    assert [each.logprob for each in found] == pytest.approx(exact)
    for each in found:
        assert len(each.top) >= 4
        assert list(each.top[:4]) == sorted(each.top[:4], key=lambda pair: -pair[1])


class Early(Guide):
    """Leaves its loop after so many steps, with reasons of its own."""

    steps = 2

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        steps = Steps(ctx, "blocks")
        while steps.go_on(1) and steps.count < self.steps:
            pieces = await draw_blocks(ctx, steps.transcript, 1, 3, steps.count)
            if steps.cut_short(pieces):
                break
            pick = await ctx.select(await value(ctx, steps.transcript, pieces, [[]]), Origin("blocks", 1))
            for event in steps.commit(pieces[pick.row], pick):
                yield event
        async for event in steps.end("stop", "enough"):
            yield event


@pytest.mark.parametrize(
    ("steps", "script", "budget", "tokens", "reasons"),
    [
        (2, [1] * 20, None, 6, ("stop", "enough", None)),
        (0, [1] * 20, None, 0, ("stop", "enough", None)),
        (9, [1] * 4, None, 5, ("stop", None, None)),  # the policy ended it
        (9, [1] * 20, None, 12, ("length", None, None)),  # max_tokens did
        (9, [1] * 20, 7, 6, ("length", None, "budget")),
    ],
)
async def test_a_guide_that_ends_its_answer_says_why(
    steps: int, script: list[int], budget: int | None, tokens: int, reasons: tuple[str, str | None, str | None]
) -> None:
    engine = TabularEngine({None: Script(script, VOCABULARY)}, renderer=RENDERER)
    sampling, limits = SamplingSpec(12, temperature=0.0, seed=1), Limits(max_tokens_generated=budget)
    guide = Early(Early.Params())
    guide.steps = steps
    end = final(await run(guide, tabular_context(engine, flat_scores(), sampling=sampling, limits=limits)))
    assert (end.finish_reason, end.stop_reason, end.stopped_by) == reasons
    assert len(end.candidates[end.chosen].token_ids) == tokens
