"""On a processor that ends at AVX2, as most laptops' and many clouds' do: reward models load, answers come, in float32.

Whatever this machine has, the server and its engine are held to AVX2 (tests/support/avx2/sitecustomize.py).
"""

import os
import platform
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
from serve_process import START_S, Serve

from guiderail.server.rewards.models.loading import load_model
from guiderail.server.settings import Settings

HOLD = str(Path(__file__).parent.parent / "support" / "avx2")
HEAD = "hh-harmless-smollm2-135m"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is an instruction set of x86-64")


def extensions(process: psutil.Process) -> set[str]:
    """vLLM's compiled extensions that a process has loaded: one for each instruction set, and no two together."""
    paths = [Path(region.path) for region in process.memory_maps()]
    return {path.name.partition(".")[0] for path in paths if path.parent.name == "vllm" and path.name.startswith("_C")}


def reference(ask: list[dict[str, str]], answer: str) -> float:
    """The bundled head's value, computed by transformers in float32, at the end of the answer's turn."""
    model = load_model(HEAD, Settings().cache, "float32")
    turns = [*ask, {"role": "assistant", "content": answer}]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float((model.decoder.eval()(ids).last_hidden_state[0, -1] @ model.heads.T)[0])


def test_a_wider_processor_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """All probes of torch on a processor with matrix tiles; this machine need not have them."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.setenv(name, "")
    has = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_tile": True, "avx10_1": True, "cpu_name": "Test"}
    probes = ("avx2", "avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16")
    cpu = SimpleNamespace(get_capabilities=lambda: has, **{f"_is_{probe}_supported": lambda: True for probe in probes})
    onednn = SimpleNamespace(**{f"_is_mkldnn_{probe}_supported": lambda: True for probe in ("bf16", "fp16")})
    runpy.run_path(f"{HOLD}/sitecustomize.py")["hold"](SimpleNamespace(cpu=cpu, ops=SimpleNamespace(mkldnn=onednn)))
    assert [key for key, value in cpu.get_capabilities().items() if value] == ["avx2", "cpu_name"]
    assert [probe for probe in probes if getattr(cpu, f"_is_{probe}_supported")()] == ["avx2"]
    assert not onednn._is_mkldnn_bf16_supported()
    assert (os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_with_a_reward_model(model_path: str, tmp_path: Path) -> None:
    server = Serve(tmp_path / "log", "--reward", f"harmless={HEAD}", env={"PYTHONPATH": HOLD})
    try:
        server.wait(lambda: server.ready() == 200, START_S)
        said = server.log.read_text()
        assert "(avx2): dtype auto is float32 on it" in said
        assert "the engine computes in float32" in said
        assert f"reward model {HEAD} computes in float32" in said
        (core,) = server.engines()
        assert extensions(core) == {"_C_AVX2"}
        assert extensions(psutil.Process(server.process.pid)) == {"_C_AVX2"}, "the reward model's norms are vLLM's too"
        with httpx.Client(base_url=server.url, timeout=120) as http:
            about = http.get("/version").json()
            assert about["dtype"] == "float32"
            assert about["processor"].endswith("(avx2)")

            ask = [{"role": "user", "content": "What is the capital of France?"}]
            plain = http.post("/v1/chat/completions", json={"messages": ask, "max_tokens": 12, "temperature": 0}).json()
            assert "Paris" in plain["choices"][0]["message"]["content"]

            guide = {"guide": {"name": "best_of_n", "n": 4}, "rewards": ["harmless"], "return_candidates": True}
            body = {"messages": ask, "max_tokens": 12, "seed": 1, "alignment": guide}
            choice = http.post("/v1/chat/completions", json=body).json()["alignment"]["choices"][0]
            assert len({candidate["rewards"]["harmless"] for candidate in choice["candidates"]}) > 1
            assert choice["chosen"] == max(choice["candidates"], key=lambda c: c["score"])["index"]

            answers = ["It is Paris, I think.", "Find out yourself, you idiot."]
            inputs = [{"messages": ask, "answers": answers}]
            scored = http.post("/v1/rewards/score", json={"inputs": inputs, "rewards": ["harmless"]}).json()
            found = [answer["score"] for answer in scored["data"][0]["answers"]]
            assert found == pytest.approx([reference(ask, answer) for answer in answers], abs=1e-3)
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_both_dtypes_of_a_reward_model_agree() -> None:
    """In a held process of its own: float32, and bfloat16 that an operator asks for, which nothing is packed for."""
    code = f"""
from pathlib import Path
import torch
from guiderail.server.models import cpu_features
from guiderail.server.rewards.models.cpu_modules import PackedLinear
from guiderail.server.rewards.models.loading import load_model
from guiderail.server.rewards.models.packed import PackedRunner
from guiderail.server.settings import Settings

assert cpu_features.instruction_set() == "avx2", cpu_features.instruction_set()
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
found = {{}}
for dtype in ("auto", "bfloat16"):
    model = load_model({HEAD!r}, Settings().cache, dtype)
    runner = PackedRunner(model.decoder, model.heads, capacity=256)
    assert not any(isinstance(module, PackedLinear) for module in model.decoder.modules())
    texts = ["Good morning to you", "Get lost, all of you"]
    found[model.decoder.dtype] = runner.score([model.tokenizer(text)["input_ids"] for text in texts])
off = (found[torch.float32] - found[torch.bfloat16]).abs().max()
assert off < 0.2, found
"""
    env = Serve.environment({"PYTHONPATH": HOLD})
    run = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
