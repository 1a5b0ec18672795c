"""Remote reward servers: what is checked before serving, and which of several gets a sequence."""

import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from scripted_pooling import NO_SERVICES, ScriptedPooling, group, logits, pooler, served
from tiny_reward import WORDS, tiny_head, tiny_tokenizer

from guiderail.guides.core.errors import GuiderailError, PluginError
from guiderail.server.rewards.models import remote_reward as remote
from guiderail.server.rewards.models.remote_reward import PrefixRouter, RemoteError
from guiderail.server.runtime import start_rewards


@pytest.fixture
async def server() -> AsyncIterator[ScriptedPooling]:
    async with ScriptedPooling() as made:
        yield made


class TestStart:
    async def test_a_server_that_is_not_there_names_reward_and_url(self, tmp_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        reward = served(tiny_head(tmp_path), url=url)
        with pytest.raises(PluginError, match=rf"reward 'good' does not start.*{url} cannot be reached \(ConnectError"):
            await start_rewards({"good": reward}, NO_SERVICES)

    async def test_activated_values_are_refused(self, server: ScriptedPooling) -> None:
        server.reads_option = False
        with pytest.raises(RemoteError, match="does not read use_activation"):
            async with pooler(server):
                pass

    async def test_a_model_without_activation_is_fine(self, server: ScriptedPooling) -> None:
        server.activation = None
        async with pooler(server) as backend:
            assert await backend.score([[9]]) == [logits([9], 2)]

    async def test_another_failure_does_not_pass_for_reading_the_option(self, server: ScriptedPooling) -> None:
        server.activation = None

        async def fault(request: web.Request) -> web.Response | None:
            return web.Response(status=500) if "neither" in await request.text() else None

        server.fault = fault
        with pytest.raises(RemoteError, match="500"):
            async with pooler(server):
                pass

    async def test_heads_are_checked(self, tmp_path: Path) -> None:
        async with ScriptedPooling(heads=3) as three, ScriptedPooling() as two:
            reward = served(tiny_head(tmp_path), url=three.url)
            with pytest.raises(RemoteError, match="gives 3 values a sequence where the model has 2 heads"):
                await reward.start(NO_SERVICES)
            with pytest.raises(RemoteError, match=f"{two.url} gives 2 values .* has 3 heads"):
                async with pooler(three, two):
                    pass
            reward = served(str(tmp_path / "base"), url=three.url, head=3)
            with pytest.raises(ValueError, match="heads 0 to 2"):
                await reward.start(NO_SERVICES)

    async def test_heads_of_a_classifier_come_from_its_configuration(self, tmp_path: Path) -> None:
        """`path` may hold tokenizer and config alone; with the tokenizer alone the server says how many."""
        tiny_tokenizer().save_pretrained(tmp_path)
        async with ScriptedPooling(heads=3) as server:
            for config, fault in (({}, None), ({"architectures": ["XForSequenceClassification"]}, "has 2 heads")):
                if config:
                    (tmp_path / "config.json").write_text(json.dumps(config))
                reward = served(str(tmp_path), url=server.url)
                if fault is None:
                    await reward.start(NO_SERVICES)
                    await reward.close()
                else:
                    with pytest.raises(RemoteError, match=fault):
                        await reward.start(NO_SERVICES)

    async def test_the_model_is_asked_for(self) -> None:
        async with ScriptedPooling(models=("base", "adapter")) as server:
            with pytest.raises(RemoteError, match="serves base, adapter; say which with model="):
                async with pooler(server):
                    pass
            with pytest.raises(RemoteError, match="serves base, adapter; there is no other"):
                async with pooler(server, model="other"):
                    pass
            async with pooler(server, model="adapter") as backend:
                await backend.score([[1]])
            assert server.seen[0]["model"] == "adapter"

    async def test_the_key_comes_from_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with ScriptedPooling(key="secret") as server:
            options = {"path": tiny_head(tmp_path), "url": server.url, "key_env": "RM_KEY"}
            with pytest.raises(GuiderailError, match="key_env=RM_KEY"):
                await served(**options).start(NO_SERVICES)
            monkeypatch.setenv("RM_KEY", "wrong")
            with pytest.raises(RemoteError, match="/v1/models with status 401") as caught:
                await served(**options).start(NO_SERVICES)
            assert "wrong" not in str(caught.value) + caplog.text
            monkeypatch.setenv("RM_KEY", "secret\n")
            reward = served(**options)
            await reward.start(NO_SERVICES)
            await reward.close()

    async def test_a_head_is_cut_and_an_overlong_input_of_another_refused(self, tmp_path: Path) -> None:
        head = tiny_head(tmp_path, max_tokens=12)
        async with ScriptedPooling() as server:
            reward = served(head, url=server.url)
            await reward.start(NO_SERVICES)
            server.seen.clear()
            await reward.score([group(" ".join(WORDS * 2))])
            await reward.close()
            ids = tiny_tokenizer()("<s> user w1 w2 </s> <s> assistant " + " ".join(WORDS * 2) + " </s>")["input_ids"]
            assert server.seen[0]["input"] == [ids[-12:]]
            reward = served(str(tmp_path / "base"), url=server.url)
            await reward.start(NO_SERVICES)
            server.seen.clear()
            with pytest.raises(ValueError, match="the model reads 96"):
                await reward.score([group(" ".join(WORDS * 2))])
            assert not server.seen
            await reward.close()


class TestRouting:
    def test_new_prefixes_take_turns_and_known_ones_go_home(self) -> None:
        router = PrefixRouter(["a", "b"])
        prompts = [[n] * 96 for n in range(6)]
        homes = [router.pick(prompt) for prompt in prompts]
        assert homes == ["a", "b", "a", "b", "a", "b"]
        for prompt, home in zip(prompts, homes, strict=True):
            assert [router.pick([*prompt, *answer]) for answer in ([7] * 90, [8], [])] == [home] * 3

    def test_a_short_shared_start_ties_nobody(self) -> None:
        router = PrefixRouter(["a", "b"])
        system = [1] * 32
        assert [router.pick([*system, *[n] * 64]) for n in range(2, 6)] == ["a", "b", "a", "b"]

    def test_affinity_gives_way_to_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "SLACK", 300)
        router = PrefixRouter(["a", "b"])
        found = [router.pick([1] * 96) for _ in range(5)]
        assert found == ["a"] * 4 + ["b"], "the fifth finds 384 tokens in flight at a and none at b"
        router.done("a", 384)
        assert router.pick([2] * 96) == "a", "the less busy one"

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "REMEMBERED", 8)
        router = PrefixRouter(["a", "b"])
        for n in range(50):
            router.pick([n] * 64)
        assert len(router._homes) == 8

    async def test_candidates_of_a_prompt_go_to_one_server(self) -> None:
        async with ScriptedPooling() as one, ScriptedPooling() as two, pooler(one, two) as backend:
            for n in range(1, 5):
                sequences = [[n] * 64 + [answer] * 9 for answer in (1, 2, 3)]
                assert await backend.score(sequences) == [logits(tokens, 2) for tokens in sequences]
            for seen in (one.seen, two.seen):
                assert [len(body["input"]) for body in seen] == [3, 3]
