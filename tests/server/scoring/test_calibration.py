"""Calibration: stored files and their refusal, pools drawn on the fly, shared, cut by deadlines, cancelled."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import PROMPT, calibrator, write
from contexts import DIGIT, context
from fakes import Faulty, ScriptedEngine, make_state

from guiderail.guides.core.errors import DeadlinePassed, EngineUnavailable, RequestError, RewardFailed
from guiderail.guides.core.metering import Limits
from guiderail.guides.core.seeds import CALIBRATION, DRAW, PICK, Seeds
from guiderail.guides.core.types import SamplingSpec, TokenPrompt
from guiderail.guides.prompters import Template, Urial
from guiderail.guides.scoring.calibration import CalibrationSpec
from guiderail.server.models.model_fingerprint import fingerprint
from guiderail.server.requests.resolve import Alignment, Resolver
from guiderail.server.requests.specs import read_alignment
from guiderail.server.scoring import calibration_file as calibration_store
from guiderail.server.scoring.calibration_file import CalibrationError, params_key, prompt_key


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    stored = calibration_store.load(write(tmp_path / "c.safetensors"))
    assert stored.reward == "last_digit"
    assert stored.values[prompt_key(PROMPT)] == (1.0, 2.0, 3.0)
    assert stored.pooled == (1.0, 2.0, 3.0, 10.0, 20.0, 30.0)
    assert stored.metadata["model"] == "m"
    assert len(stored.metadata["date"]) == 10
    calibration_store.check(stored, tmp_path, "rev", "1")


@pytest.mark.parametrize(
    ("served", "message"),
    [(("other", "1"), "another model"), (("rev", "2"), "another reward"), (("rev", None), "not served")],
)
def test_a_mismatch_is_refused(tmp_path: Path, served: tuple[str, str | None], message: str) -> None:
    stored = calibration_store.load(write(tmp_path / "c.safetensors"))
    with pytest.raises(CalibrationError, match=message):
        calibration_store.check(stored, tmp_path, *served)


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"keys": np.zeros((1, 32), np.uint8)}, tmp_path / "other.safetensors")
    for name in ("text", "missing", "other.safetensors"):
        with pytest.raises(CalibrationError):
            calibration_store.load(tmp_path / name)


async def test_stored_values_of_the_prompt_come_first_and_pooled_ones_where_they_are_asked_for(tmp_path: Path) -> None:
    found = calibrator(calibration_store.load(write(tmp_path / "c.safetensors")))
    engine = ScriptedEngine()
    own = await found.of(context(engine), DIGIT)
    unknown = {"prompt": TokenPrompt((5, 5))}
    auto = await found.of(context(engine, calibration=CalibrationSpec(n=4), **unknown), DIGIT)
    asked = CalibrationSpec(source="pooled")
    pooled = await found.of(context(engine, calibration=asked, **unknown), DIGIT)
    known = await found.of(context(engine, calibration=asked), DIGIT)
    drawn = await found.of(context(engine, calibration=CalibrationSpec(source="drawn", n=4)), DIGIT)
    assert (own.source, own.values) == (known.source, known.values) == ("stored", (1.0, 2.0, 3.0))
    assert (auto.source, len(auto.values)) == ("drawn", 4)
    assert (pooled.source, len(pooled.values)) == ("stored_pooled", 6)
    assert (drawn.source, len(drawn.values)) == ("drawn", 4)
    with pytest.raises(RequestError, match="does not have this prompt"):
        await found.of(context(engine, calibration=CalibrationSpec(source="stored"), **unknown), DIGIT)


OTHERWISE: list[tuple[dict[str, Any], str]] = [
    ({"sampling": SamplingSpec(60, seed=10)}, "max_tokens is 60 here and 50 there"),
    ({"sampling": SamplingSpec(50, 0.3)}, "temperature is 0.3 here and 1.0 there"),
    ({"sampling": SamplingSpec(50, top_p=0.9)}, "top_p is 0.9 here"),
    ({"sampling": SamplingSpec(50, stop=("x",))}, "stop is"),
    ({"sampling": SamplingSpec(50, logit_bias={3: 1.0})}, "logit_bias is"),
    ({"prompter": Urial(style="brief")}, "prompter is"),
    ({"told": ["Be kind."]}, "told more"),
    ({"prompt": TokenPrompt((1, 2), "adapter")}, "served model alone"),
]


@pytest.mark.parametrize(("more", "what"), OTHERWISE)
async def test_answers_sampled_otherwise_are_not_served(more: dict[str, Any], what: str, tmp_path: Path) -> None:
    found = calibrator(calibration_store.load(write(tmp_path / "c.safetensors")))
    drawn = await found.of(context(ScriptedEngine(), calibration=CalibrationSpec(n=4), **more), DIGIT)
    assert (drawn.source, len(drawn.values)) == ("drawn", 4)
    for source in ("stored", "pooled"):
        with pytest.raises(RequestError, match=re.escape(what)) as failure:
            await found.of(context(ScriptedEngine(), calibration=CalibrationSpec(source=source), **more), DIGIT)
        assert failure.value.param == "alignment.calibration.source"


def resolve(rules: Resolver, alignment: Any, suffix: str | None = None) -> Alignment:
    return rules.resolve(read_alignment(alignment), suffix)


def test_the_operator_chooses_pooled_for_all_requests_in_the_configuration() -> None:
    resolver = make_state(ScriptedEngine(), alignment={"calibration": {"source": "pooled"}}).resolver
    assert resolve(resolver, None).calibration.source == "pooled"
    assert resolve(resolver, {"calibration": {"source": "auto"}}).calibration.source == "auto"
    assert resolve(make_state(ScriptedEngine()).resolver, None).calibration.source == "auto"


async def test_of_several_files_the_one_that_was_sampled_alike_serves(tmp_path: Path) -> None:
    cold = {**calibration_store.conditions(SamplingSpec(50, 0.5), Template().dump()), "seed": 3}
    files = [write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors", sampling=cold)]
    found = calibrator(*map(calibration_store.load, files))
    for temperature in (0.5, 1.0):
        sample = await found.of(context(ScriptedEngine(), sampling=SamplingSpec(50, temperature, seed=1)), DIGIT)
        assert sample.source == "stored"
    sample = await found.of(context(ScriptedEngine(), sampling=SamplingSpec(50, 0.7, seed=1)), DIGIT)
    assert sample.source == "drawn"


async def test_asking_for_a_store_that_is_not_there_names_the_field() -> None:
    with pytest.raises(RequestError) as failure:
        await calibrator().of(context(ScriptedEngine(), calibration=CalibrationSpec(source="stored")), DIGIT)
    assert failure.value.param == "alignment.calibration.source"


async def test_concurrent_equal_prompts_share_one_pool_and_one_pays() -> None:
    engine, found = ScriptedEngine(step_s=0.005), calibrator()
    contexts = [context(engine, calibration=CalibrationSpec(n=6)) for _ in range(3)]
    samples = await asyncio.gather(*(found.of(ctx, DIGIT) for ctx in contexts))
    assert engine.peak == 6
    assert sorted(s.source for s in samples) == ["drawn", "shared", "shared"]
    assert len({s.values for s in samples}) == 1
    assert sorted(ctx.spend.calibration_tokens for ctx in contexts) == [0, 0, 24]
    assert all(ctx.spend.tokens_generated == 0 for ctx in contexts)
    other = await found.of(context(engine, prompt=TokenPrompt((7,)), calibration=CalibrationSpec(n=6)), DIGIT)
    assert other.source == "drawn"


async def test_the_pool_is_apart_from_the_candidates() -> None:
    seen: list[int] = []
    engine = ScriptedEngine(lambda seed: seen.append(seed) or [f"w{seed}"])  # type: ignore[func-returns-value]
    await calibrator().of(context(engine, calibration=CalibrationSpec(n=3)), DIGIT)
    assert seen == Seeds(10).stream(3, CALIBRATION)
    assert not {*seen} & {*range(10, 14), *(seed for name in (DRAW, PICK) for seed in Seeds(10).stream(64, name))}


async def test_a_deadline_takes_what_there_is() -> None:
    short = Seeds(10).stream(8, CALIBRATION)[::2]
    engine = ScriptedEngine(lambda seed: ["w1"] * (1 if seed in short else 1000), step_s=0.01)
    ctx = context(engine, calibration=CalibrationSpec(n=8), limits=Limits(deadline=time.monotonic() + 0.2))
    sample = await calibrator().of(ctx, DIGIT)
    assert len(sample.values) == 4
    assert engine.num_running() == 0


async def test_a_deadline_before_two_answers_is_an_error() -> None:
    ctx = context(ScriptedEngine(step_s=5), limits=Limits(deadline=time.monotonic() + 0.05))
    with pytest.raises(DeadlinePassed, match="calibration"):
        await calibrator().of(ctx, DIGIT)


async def test_a_pool_goes_on_while_one_waits_and_ends_with_the_last() -> None:
    engine, found = ScriptedEngine(lambda seed: ["w1"] * 50, step_s=0.005), calibrator()
    waiting = [asyncio.create_task(found.of(context(engine), DIGIT)) for _ in range(2)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()
    await asyncio.sleep(0.02)
    assert engine.num_running() > 0
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert engine.num_running() == 0
    assert len((await found.of(context(engine), DIGIT)).values) == 32  # nothing broken is kept


async def test_failures_surface_and_are_not_kept() -> None:
    engine, found = ScriptedEngine(fail_after=1), calibrator()
    with pytest.raises(EngineUnavailable):
        await found.of(context(engine), DIGIT)
    engine.fail_after = None
    reward = Faulty("raise")
    with pytest.raises(RewardFailed):
        await found.of(context(engine, reward=reward), DIGIT)
    reward.fault = ""
    assert set((await found.of(context(engine, reward=reward), DIGIT)).values) == {1.0}


async def test_old_pools_are_dropped() -> None:
    engine, found = ScriptedEngine(), calibrator(max_pools=2)
    spec = CalibrationSpec(n=2)
    for token in (1, 2, 3, 1):
        sample = await found.of(context(engine, prompt=TokenPrompt((token,)), calibration=spec), DIGIT)
        assert sample.source == "drawn"
    again = await found.of(context(engine, prompt=TokenPrompt((3,)), calibration=spec), DIGIT)
    assert again.source == "shared"


async def test_sampling_parameters_tell_pools_apart() -> None:
    engine, found = ScriptedEngine(), calibrator()
    for temperature in (0.5, 1.0):
        sampling = SamplingSpec(50, temperature, seed=10, logit_bias={3: 1.0})
        assert (await found.of(context(engine, sampling=sampling), DIGIT)).source == "drawn"


def test_fingerprints_see_a_change_of_weights_but_not_of_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3_000_000))
        (tmp_path / name / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(2_999_999) + b"x")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))


def test_params_are_part_of_a_calibration() -> None:
    from guiderail.server.rewards.rules import Length

    assert params_key(Length.Params(target=5)) != params_key(Length.Params(target=6))
    assert params_key(None) == "{}"
