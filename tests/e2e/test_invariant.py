"""A seed in the batch-invariant mode: the same answer to the last token, whatever runs beside it."""

from dataclasses import replace

import httpx
import pytest
from seeded import KINDS, answers, requests
from serving import Live, serving

from guiderail.guides.core.errors import EngineUnavailable
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 90 requests, 60 of them one after the other
async def test_seeded_requests_answer_alike_alone_again_and_beside_others(model_path: str, live: Live) -> None:
    """Thirty requests of all kinds of guides, on a cache that is too small for them at once."""
    engine = await build(
        EngineSettings(model=model_path, max_model_len=512, kv_cache_gb=0.06, batch_invariant=True, max_num_seqs=64)
    )
    try:
        assert engine.dtype == "float32" or not live.state.engine.dtype
        settings = live.state.settings.model_copy(update={"batch_invariant": True})
        asked = requests(tokens=10)
        assert len(asked) == 30
        async with (
            serving(replace(live.state, engine=engine, settings=settings)) as url,
            httpx.AsyncClient(base_url=url, timeout=600) as client,
        ):
            got = await answers(client, [body for _, body in asked])
            (body,) = [body for kind, body in asked if kind == "sampling"][:1]
            mode = (await client.post("/v1/chat/completions", json=body)).json()["system_fingerprint"]
        assert mode.endswith(" batch-invariant")
        differ = [
            (how, kind, one, other)
            for how in ("again", "beside")
            for (kind, _), one, other in zip(asked, got["alone"], got[how], strict=True)
            if one != other
        ]
        assert not differ
        assert len(set(got["alone"])) > 2 * len(KINDS), "the control: seeds and guides make a difference"
    finally:
        await engine.close()


async def test_a_dtype_that_cannot_keep_it_is_refused(model_path: str) -> None:
    with pytest.raises(EngineUnavailable, match="float32 or auto, not bfloat16"):
        await build(EngineSettings(model=model_path, dtype="bfloat16", batch_invariant=True))
