"""Transfer Q* with a baseline on a real vLLM server, and what happens when that is lost."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import Serve
from vllm_server import vllm_server

FLOAT32 = ("--dtype", "float32")  # so that no two tokens are a tie that batches decide


def ask(url: str, baseline: dict[str, Any]) -> httpx.Response:
    """Transfer Q* with one greedy rollout a candidate, whose reward outweighs the prior."""
    guide = {"name": "transfer_q", "top_k": 4, "lookahead": 6, "temperature": 0, "alpha": 0.05, "baseline": baseline}
    alignment = {"guide": guide, "rewards": [{"name": "sentiment"}], "return_candidates": True}
    messages = [{"role": "user", "content": "How was the concert?"}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, "alignment": alignment}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_baseline_on_another_server_is_the_same_policy_here(model_path: str, tmp_path: Path) -> None:
    server = None
    try:
        with vllm_server(model_path, *FLOAT32, "--served-model-name", "twin", log=tmp_path / "vllm.log") as url:
            server = Serve(tmp_path / "serve.log", *FLOAT32, "--policy", f"aligned={url}", "--rewards", "sentiment")
            server.wait(lambda: server is not None and server.ready() == 200, 120)
            aligned = {"system": "You love music and say so."}
            here, there = (ask(server.url, {**aligned, **more}).json() for more in ({}, {"model": "aligned"}))
            assert there["choices"][0]["message"] == here["choices"][0]["message"]
            same = ("candidates", "chosen", "rewards")
            assert {k: there["alignment"]["choices"][0].get(k) for k in same} == {
                k: here["alignment"]["choices"][0].get(k) for k in same
            }
            assert there["alignment"]["spend"]["tokens_generated"] == here["alignment"]["spend"]["tokens_generated"]
            wrong = ask(server.url, {"model": "else"})
            assert wrong.status_code == 400
            assert "no policy 'else'; known: aligned, smollm2-135m-instruct" in wrong.json()["error"]["message"]
        lost = ask(server.url, {"model": "aligned"})
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "engine_unavailable")
        assert "policy 'aligned': its server cannot be reached" in lost.json()["error"]["message"]
        assert url not in lost.text
        assert ask(server.url, {}).status_code == 200, "requests that do not need it go on"
    finally:
        if server is not None:
            server.kill()
