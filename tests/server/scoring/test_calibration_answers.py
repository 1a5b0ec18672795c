"""Calibration answers: apart where anything differs that values depend on, and read as candidates are."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrations import calibrator, write
from contexts import DIGIT, context
from fakes import LastDigit, ScriptedEngine

from guiderail.guides.core.reward import TextReward
from guiderail.guides.core.types import Candidate, Delta, Message, SamplingSpec, TokenPrompt
from guiderail.guides.prompters import SystemMessage, Urial
from guiderail.guides.scoring import RewardTerm, parse_chain
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.server.scoring import calibration_file as calibration_store

DIGIT_CALIBRATED = RewardTerm("last_digit", "last_digit", 1.0, None, parse_chain("calibrated"))


def lettered(engine: ScriptedEngine) -> Any:
    """The engine's deltas with the words' letters as token ids, which LetterRenderer decodes."""
    plain = engine.deltas

    async def deltas(*args: Any) -> AsyncGenerator[Delta, None]:
        async for delta in plain(*args):
            yield replace(delta, token_ids=tuple(map(ord, delta.text)))

    return deltas


APART: list[dict[str, Any]] = [
    {"messages": (Message("system", "Be kind."), Message("user", "q"))},
    {"told": ["Be kind."]},
    {"prompter": SystemMessage(preferences=("Be kind.",))},
    {"sampling": SamplingSpec(50, seed=11)},
    {"prompt": TokenPrompt((1, 2), "adapter")},
]


@pytest.mark.parametrize("more", APART)
async def test_a_pool_is_shared_by_requests_alike_in_all_that_its_values_depend_on(more: dict[str, Any]) -> None:
    """All that a pool belongs to: conversation, prompter and seed, besides prompt and sampling."""
    seen: list[tuple[Message, ...]] = []

    class Reader(LastDigit):
        async def score(self, groups: Any) -> Any:
            seen.extend(group.messages for group in groups)
            return await super().score(groups)

    engine, reward, spec = ScriptedEngine(), Reader(), CalibrationSpec(n=3)
    alone = await calibrator().of(context(engine, reward=reward, calibration=spec, **more), DIGIT)
    found = calibrator()
    await found.of(context(engine, reward=reward, calibration=spec), DIGIT)
    ctx = context(engine, reward=reward, calibration=spec, **more)
    after = await found.of(ctx, DIGIT)
    assert (after.source, sorted(after.values)) == ("drawn", sorted(alone.values))
    assert seen[-1] == ctx.dialogue.view
    assert (await found.of(context(engine, reward=reward, calibration=spec, **more), DIGIT)).source == "shared"


async def test_calibration_answers_are_cleaned_as_candidates_are() -> None:
    """Of a model that goes on with a turn of its own, the answer alone is scored, its tokens cut to it."""
    read: list[tuple[str, int]] = []

    class Reader(LastDigit):
        async def score(self, groups: Any) -> Any:
            read.extend((a.text, len(a.token_ids)) for group in groups for a in group.answers)
            return await super().score(groups)

    engine = ScriptedEngine(lambda seed: list("w1\n```\n\n# Query:\n```\nw9?"))
    engine.deltas = lettered(engine)  # type: ignore[method-assign]
    urial = Urial()
    ctx = context(engine, reward=Reader(), calibration=CalibrationSpec(n=4), prompter=urial, cleaner=urial.cleaner,
                  rewards=(DIGIT_CALIBRATED,))  # fmt: skip
    sample = await calibrator().of(ctx, DIGIT)
    candidate = Candidate(0, "w1\n```\n\n# Query:\n```\nw9?", tuple(map(ord, "w1\n```\n\n# Query:\n```\nw9?")), "stop")
    answer = ctx.dialogue.answer(candidate.text, candidate.token_ids)
    assert set(read) == {(answer.text, len(answer.token_ids))} == {("w1", 2)}
    assert len(sample.values) == 4


@pytest.mark.parametrize(("ids", "quantile"), [(3, 0.5), (6, 0.5)])
async def test_a_partial_answer_is_calibrated_on_answers_cut_at_its_length(ids: int, quantile: float) -> None:
    """A reward that grows with length is not lowest for all that is not whole yet."""

    class Long(TextReward):
        def score_text(self, prompt: str, answer: str, params: Any) -> float:
            return float(len(answer))

    engine = ScriptedEngine(lambda seed: list("abcdefghijklm"))
    engine.deltas = lettered(engine)  # type: ignore[method-assign]
    ctx = context(
        engine, reward=Long(), calibration=CalibrationSpec(n=4), rewards=(DIGIT_CALIBRATED,), calibrator=calibrator()
    )
    whole = Candidate(0, "abcdefghijklm", tuple(map(ord, "abcdefghijklm")), "stop")
    begun = Candidate(1, "abcdefghijklm"[:ids], tuple(map(ord, "abcdefghijklm"[:ids])), "partial")
    async with ctx:
        whole, begun = (await ctx.score([whole, begun])).candidates
    assert whole.transformed == begun.transformed == {"last_digit": quantile}
    assert ctx.spend.calibration_tokens == 4 * 13
    assert ctx.report.calibration["last_digit"] == {"source": "drawn", "n": 4}


async def test_partial_answers_on_stored_values_are_warned_of(tmp_path: Path) -> None:
    found = calibrator(calibration_store.load(write(tmp_path / "c.safetensors")))
    ctx = context(ScriptedEngine(), rewards=(DIGIT_CALIBRATED,), calibrator=found)
    async with ctx:
        await ctx.score([Candidate(0, "w2", (1, 2), "stop")])
        assert ctx.report.warnings == []
        await ctx.score([Candidate(0, "w2", (1, 2), "partial")])
    assert ["stored values of whole ones" in warning for warning in ctx.report.warnings] == [True]
