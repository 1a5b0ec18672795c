"""The vLLM pooling backend: the same values as the packed one, from an engine of its own."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.rewards.models.loading import model_reward
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.settings import Settings


async def check_that_its_death_is_told(reward: Any, group: ScoreGroup, caplog: pytest.LogCaptureFixture) -> None:
    """Kills the engine that was started last; every score that is asked for then says of what it died."""
    engines = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in "".join(p.cmdline())]
    max(engines, key=lambda process: process.create_time()).kill()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"reward model's engine died: killed by SIGKILL \(out of memory\?\)"):
            await reward.score([group])
    assert caplog.messages.count("a reward model's engine died: killed by SIGKILL (out of memory?)") == 1


@pytest.mark.slow
async def test_both_backends_give_the_same_values(
    model_path: str, reward_head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    services: Any = None
    (tmp_path / "models").symlink_to(Settings().cache / "models")  # the base is there; what is made goes to tmp_path
    ask = (Message("user", "Tell me about your day and a friend."),)
    texts = ["I met Ana.", "No.", "My friend Ana and I walked along the river, and then we had soup."]
    found = {}
    for backend in ("packed", "vllm"):
        # In bfloat16 each backend is off by up to 0.07 here, on each kind of CPU differently.
        spec = RewardModelSpec(path=reward_head, backend=backend, dtype="float32", kv_gb=0.5)
        reward = model_reward(spec, tmp_path, print)
        await reward.start(services)
        try:
            for head in ([1.0, 0.0], [0.0, 1.0]):
                group = ScoreGroup(ask, TokenPrompt((1,)), tuple(map(Answer, texts)), reward.Params(heads=head))
                found[backend, head[0]] = (await reward.score([group]))[0]
            if backend == "vllm":
                await check_that_its_death_is_told(reward, group, caplog)
        finally:
            await reward.close()
    for head in (1.0, 0.0):
        assert found["packed", head].values == pytest.approx(found["vllm", head].values, abs=1e-4)
        assert found["packed", head].tokens == found["vllm", head].tokens
