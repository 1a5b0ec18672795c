"""A reward model on a real `vllm serve --runner pooling`: over HTTP it has the values of the packed backend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_server import vllm_server

from guiderail.guides.core.interfaces import ScoreResult
from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.rewards.models.loading import classifier_folder, model_reward
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.settings import Settings

FLAGS = "--runner pooling --dtype float32 --served-model-name rm"
NO_SERVICES: Any = None


@pytest.fixture
def pooling_server(model_path: str, reward_head: str, tmp_path: Path) -> Iterator[str]:
    """URL of a pooling server of the head's model, which starts in some 25 s."""
    (tmp_path / "models").symlink_to(Settings().cache / "models")  # the base is there; what is made goes to tmp_path
    folder = classifier_folder(reward_head, tmp_path)
    with vllm_server(folder, *FLAGS.split(), key="the key", log=tmp_path / "vllm.log") as url:
        yield url


@pytest.mark.slow
async def test_a_remote_server_gives_the_values_of_the_packed_backend(
    pooling_server: str, reward_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-4 in float32, where scores differ by 0.3."""
    monkeypatch.setenv("RM_KEY", "the key")
    ask = (Message("user", "Tell me about your day and a friend."),)
    texts = ["I met Ana.", "No.", "My friend Ana and I walked along the river, and then we had soup."]
    given = (*map(Answer, texts), Answer("My friend Ana and", partial=True))
    remote = RewardModelSpec(path=reward_head, backend="vllm", url=pooling_server, key_env="RM_KEY")
    found: dict[tuple[str, float], ScoreResult] = {}
    body = {"model": "rm", "task": "classify", "input": [[1, 2]], "use_activation": "neither"}
    async with httpx.AsyncClient() as http:  # what the check at start tells a server by that reads the option
        assert (await http.post(f"{pooling_server}/pooling", json=body)).status_code == 400
    for name, spec in (("packed", RewardModelSpec(path=reward_head, dtype="float32")), ("remote", remote)):
        reward = model_reward(spec, tmp_path, print)
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
        assert found["remote", head].values == pytest.approx(values, abs=1e-4)
        assert found["remote", head].tokens == found["packed", head].tokens
        assert max(values) - min(values) > 0.3, "they tell the answers apart"
