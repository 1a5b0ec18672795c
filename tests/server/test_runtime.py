"""`guiderail serve` from its start to its end, as a process, with a scripted engine in place of vLLM's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serve_process import free_port

SUPPORT = str(Path(__file__).parent.parent / "support")
SERVE = f"""
import asyncio, sys, time
sys.path.append({SUPPORT!r})
from fakes import ScriptedEngine
from guiderail.server import runtime
from guiderail.server.settings import Settings

class Local(ScriptedEngine):
    async def close(self):
        self.up = False

async def build(settings, say):
    if KEPT:
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 1000)
    return Local(lambda seed: ["w"] * 100_000, step_s=0.01)

runtime.build = build
runtime.forkserver.start_preload = lambda: None
runtime.END_S = 3.0 if KEPT else 60.0
raise SystemExit(runtime.serve(Settings(guides=["sampling"], rewards=["length"], port=PORT, drain_timeout_s=0.5)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_sigterm_ends_a_server_whose_work_does_not_end(kept: bool, model_path: str) -> None:
    """kept: a thread of its executor computes for ever, too."""
    port = free_port()
    code = SERVE.replace("KEPT", str(kept)).replace("PORT", str(port))
    with subprocess.Popen([sys.executable, "-P", "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ) as run:
        try:
            assert run.stderr is not None
            said = [next(line for line in run.stderr if "ready after" in line or "rror" in line)]
            assert "ready after" in said[0]
            url, body = f"http://127.0.0.1:{port}", {"prompt": "Hi", "max_tokens": 400, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                lines = response.iter_lines()
                next(lines)
                run.send_signal(signal.SIGTERM)
                events = [line.removeprefix("data: ") for line in lines if line]
            assert json.loads(events[-2])["error"]["code"] == "shutting_down"
            assert events[-1] == "[DONE]"
            assert run.wait(60) == 0
            said += run.stderr.readlines()
        finally:
            run.kill()
    assert "Traceback" not in "".join(said)
    assert said[-1].startswith(
        "guiderail: stopped, though something still ran (threads: " if kept else "guiderail: stopped\n"
    )
    assert sum(" 200 seconds=" in line for line in said) == 1
