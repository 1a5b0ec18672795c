"""Log-probabilities of a bfloat16 engine: on no grid, and the same for all that reads them."""

from collections.abc import Iterable
from itertools import combinations

import pytest
from serving import Live

from guiderail.guides.core.types import Message, Mixed, SamplingSpec, TokenPrompt
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings

STEP = 2**-5  # between bfloat16 numbers from 4 to 8; of larger ones it is a multiple


def on_the_grid(values: Iterable[float]) -> float:
    """Share of the differences that are multiples of STEP: all of them for logits in bfloat16."""
    steps = [(a - b) / STEP for a, b in combinations(values, 2)]
    return sum(abs(step - round(step)) < 0.01 for step in steps) / len(steps)


@pytest.mark.slow
async def test_log_probabilities_in_bfloat16_are_on_no_grid(model_path: str, live: Live) -> None:
    ids = live.state.renderer.render((Message("user", "What is the capital of France?"),)).token_ids
    shares = {}
    for float32_logits in (False, True):
        engine = await build(
            EngineSettings(
                model=model_path,
                dtype="bfloat16",
                max_model_len=256,
                kv_cache_gb=0.05,
                float32_logits=float32_logits,
            )
        )
        try:
            await engine.next_token_logprobs([TokenPrompt(ids)], 20)  # from now on the prompt is cached
            (found,) = await engine.next_token_logprobs([TokenPrompt(ids)], 20)
            shares[float32_logits] = on_the_grid(found.values())
            if not float32_logits:
                continue
            assert len(set(found.values())) == 20
            for token in list(found)[:3]:
                ((alone,),) = await engine.answer_logprobs([TokenPrompt(ids)], [[token]])
                assert alone == pytest.approx(found[token], abs=1e-4)
            mixed = TokenPrompt(ids, None, (Mixed(ids, None, 1.0),))
            async with engine.generate([mixed], SamplingSpec(1, 0.0, logprobs=20)) as rollouts:
                (row,) = [row async for delta in rollouts for row in delta.logprobs or ()]
            assert on_the_grid([value for _, value in row.top]) < 0.2
        finally:
            await engine.close()
    assert shares[False] > 0.95, "the control: bfloat16 logits"
    assert shares[True] < 0.2
